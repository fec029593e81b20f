"""`python -m singerembed`."""

from singerembed.cli import main

main()
