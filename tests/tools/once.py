"""What all processes of one test run share: made by the first that asks, read by the others."""

import os

from filelock import FileLock


def make_once(tmp_path_factory, name, make):
    """The folder of that name, filled by `make(folder)` once in this run. Read only."""
    home = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Each process has a folder of its own below the run's.
        home = home.parent
    folder, done = home / f"once-{name}", home / f"once-{name}.done"
    with FileLock(home / f"once-{name}.lock"):
        if not done.exists():
            folder.mkdir()
            make(folder)
            done.touch()
    return folder
