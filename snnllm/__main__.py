"""`python -m snnllm`: the command line."""

import sys

from snnllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
