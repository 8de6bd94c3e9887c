"""Entry point of ``python -m galaxydist``, the same as the command ``galaxydist``."""

import sys

from galaxydist.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
