"""The command line as a test calls it: in this process, with an exit status."""

import sys

import pytest

from kangaroo import cli


def invoke(*arguments: str) -> int:
    """Run `kangaroo` with these arguments; returns what it exits with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["kangaroo", *arguments])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0
