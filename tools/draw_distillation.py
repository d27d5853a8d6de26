#!/usr/bin/env python
"""From a checkout of d2kd, the same as `d2kd draw`."""

import sys

from d2kd.cli.draw import main
from d2kd.utils.user_mistakes import run_command

if __name__ == "__main__":
    sys.exit(run_command("d2kd draw", main))
