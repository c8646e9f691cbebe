"""`python -m jilju` is the command `jilju`."""

from jilju.cli import main

main()
