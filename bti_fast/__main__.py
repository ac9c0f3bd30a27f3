"""``python -m bti_fast`` is the command bti-fast."""

import sys

from bti_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
