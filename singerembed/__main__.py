"""`python -m singerembed`."""

from singerembed.cli.main import main

main()
