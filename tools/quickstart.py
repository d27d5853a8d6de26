#!/usr/bin/env python
"""From a checkout of d2kd, the same as `d2kd quickstart`; for other tools, its parts."""

import os
import sys

from d2kd.cli.steps import METRICS, Steps, evaluation  # noqa: F401
from d2kd_cli import main

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

if __name__ == "__main__":
    sys.exit(main(["quickstart", *sys.argv[1:]]))
