"""A virtual machine that lives on Fleecer. Collected only with `-m guest`, as `make test-guest` does."""
