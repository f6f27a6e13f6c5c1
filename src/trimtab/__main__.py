"""``python -m trimtab``, the same as ``trimtab``."""

import sys

from trimtab.cli import main

if __name__ == "__main__":
    sys.exit(main())
