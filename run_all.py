#!/usr/bin/env python3
"""The suite's command line: `python run_all.py --help`. It is `harness.cli.main`, which the installed command runs too."""

import sys

try:
    from harness.cli.main import main
except KeyboardInterrupt:  # stopped while it was still being imported
    sys.exit(130)

if __name__ == "__main__":
    sys.exit(main())
