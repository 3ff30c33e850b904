"""`python -m fastgpt2`, and `torchrun ... -m fastgpt2 train ...`: the command line."""

import sys

from fastgpt2.cli import main

if __name__ == "__main__":
    sys.exit(main())
