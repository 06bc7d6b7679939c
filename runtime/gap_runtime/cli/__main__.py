"""`python -m gap_runtime.cli` is `gap-runtime`."""

import sys

from gap_runtime.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
