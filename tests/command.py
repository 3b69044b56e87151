"""The command as a person calls it, in this process."""

import sys

import pytest

from workbench import cli


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run `workbench` with these arguments and give its exit code."""
    monkeypatch.setattr(sys, "argv", ["workbench", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0
