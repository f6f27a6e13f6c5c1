"""``python -m evidence``."""

import sys

from evidence.runner import main

if __name__ == "__main__":
    sys.exit(main())
