"""
Write a run, finished or not, as one HTML file that can be sent: config, teacher, levels, classes,
curves, gradients, pictures, and the verdict and the proof of an export where there are any.
"""

import argparse
import os
from typing import Optional, Sequence

from ..report import gather, render
from ..utils.atomic_file import atomic_write
from .common import command_parser

EXAMPLES = """
Examples:
  d2kd report output/quickstart/pkd
  d2kd report output/run --export exported --output run.html

The file needs no other and no network. It has pictures where the run had VIS_PERIOD above 0.
"""


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    page = render(gather(args.folder, args.compare, args.export))
    path = args.output or os.path.join(args.folder, "report.html")
    with atomic_write(path, "w") as file:
        file.write(page)
    print(f"Wrote {path}")


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("d2kd report", __doc__, EXAMPLES)
    add = parser.add_argument
    add("folder", metavar="OUTPUT_DIR", help="of the run")
    add("--output", default="", metavar="FILE", help="default: report.html in OUTPUT_DIR")
    add(
        "--compare",
        default="",
        metavar="FOLDER",
        help="of d2kd compare; default: beside OUTPUT_DIR, or that in which it is",
    )
    add("--export", default="", metavar="FOLDER", help="of d2kd export; default: in OUTPUT_DIR")
    return parser.parse_args(argv)
