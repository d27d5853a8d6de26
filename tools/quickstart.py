#!/usr/bin/env python
"""From a checkout of d2kd, the same as `d2kd quickstart`; for other tools, its parts."""

import os
import sys

from d2kd.cli.steps import (  # noqa: F401
    MASK_AP,
    METRICS,
    Steps,
    evaluation,
    mask_warning,
    metrics_of,
)
from d2kd_cli import main

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

if __name__ == "__main__":
    sys.exit(main(["quickstart", *sys.argv[1:]]))
