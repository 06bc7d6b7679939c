"""The command line as a test calls it."""

import pytest

from gap_export.cli import main as cli


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run gap-export in an empty folder; gives exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run_in_process(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run_in_process
