"""The program: a daemon put together from its options, its run directory and event loop; and whole images copied."""
