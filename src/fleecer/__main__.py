"""`python -m fleecer` is the program `fleecer`."""

from fleecer.cli import main

if __name__ == "__main__":
    main()
