#!/usr/bin/env python
"""From a checkout of d2kd, the same as `d2kd draw-detections`."""

import sys

from d2kd.cli.draw_detections import draw_detections, main  # noqa: F401
from d2kd.utils.user_mistakes import run_command

if __name__ == "__main__":
    sys.exit(run_command("d2kd draw-detections", main))
