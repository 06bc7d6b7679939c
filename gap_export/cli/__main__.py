"""`python -m gap_export.cli` is `gap-export`."""

import sys

from gap_export.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
