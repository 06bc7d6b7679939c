"""Where `gap-runtime` begins: Ctrl-C is one line even while Python still loads the rest."""

from __future__ import annotations

import atexit
import gc

from gap_runtime.cli.interrupts import stop_early


def main() -> int:
    """Entry point of `gap-runtime`."""
    stop_early()
    # At its end Python would look through all that libraries made for what is dead: a tenth of a
    # short command's time.
    atexit.register(gc.freeze)
    from gap_runtime.cli.main import main as run  # noqa: PLC0415 - after the signal

    return run()
