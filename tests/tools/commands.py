"""Commands as tests call them."""

from gap_export.cli import main as cli


def dry_run(folder, *arguments):
    """Exit code of `gap-export FOLDER --dry-run`."""
    template = "prompt.template=USER: <image> {phrase}"
    return cli.main([str(folder), "--dry-run", "--set", template, *arguments])
