"""What the tests of ``tune-lce bench`` share."""

import sys

import pytest

from torchtune_lce.commands import cli


@pytest.fixture
def tune_lce(monkeypatch, capsys):
    """Runs ``tune-lce bench`` in this process; returns its exit status and what it printed."""

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["tune-lce", "bench", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        captured = capsys.readouterr()
        return end.value.code, captured.out + captured.err

    return run
