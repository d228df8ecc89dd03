"""`python -m flashserve_gateway`: what the launcher starts."""

import sys

from .command import main

if __name__ == "__main__":
    sys.exit(main())
