#!/usr/bin/env python
"""From a checkout of d2kd, the same as `d2kd draw-detections`."""

import sys

from d2kd_cli import main

if __name__ == "__main__":
    sys.exit(main(["draw-detections", *sys.argv[1:]]))
