"""python -m d2kd: the command d2kd, where its script is not on the path."""

import sys

from d2kd_cli import main

if __name__ == "__main__":
    sys.exit(main())
