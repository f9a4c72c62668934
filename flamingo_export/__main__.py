"""`python -m flamingo_export`: the command line, where its script is not on the path."""

from __future__ import annotations

import sys

from flamingo_export.cli import main

if __name__ == "__main__":
    sys.exit(main())
