"""`python -m alignvec`: the command line."""

from alignvec.cli import main

main()
