"""`python -m alignvec`: the command line."""

from alignvec.cli import main

if __name__ == "__main__":
    main()
