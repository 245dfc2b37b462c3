"""`python -m based_megatron` is `based`."""

import sys

from based_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main())
