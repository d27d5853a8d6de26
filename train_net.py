#!/usr/bin/env python
"""Train or evaluate a student from a checkout of d2kd: the same as `d2kd train`."""

import sys

from d2kd.cli.train import main, parse_args  # noqa: F401
from d2kd.utils.user_mistakes import run_command

if __name__ == "__main__":
    sys.exit(run_command("train_net.py", main))
