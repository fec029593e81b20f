"""The entry point of the `singerembed` command, and `python -m singerembed`."""

from __future__ import annotations

import signal


def main() -> None:
    """Import the command line and run it. Ctrl-C ends the process without a traceback from the start."""
    # A shell may start it with Ctrl-C ignored.
    is_heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_heeded:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while modules are imported there is nothing to clean up
    from singerembed.cli.main import main as run

    if is_heeded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    run()


if __name__ == "__main__":
    main()
