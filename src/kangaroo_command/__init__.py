"""The `kangaroo` command. Apart from the package, whose import takes seconds in which a user may press Ctrl-C."""

import sys


def main() -> None:
    """Entry point."""
    try:
        from kangaroo.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(130)
