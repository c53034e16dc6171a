"""``python -m orthattack``: the command line."""

import sys

from orthattack.eval.cli import main

if __name__ == "__main__":
    sys.exit(main())
