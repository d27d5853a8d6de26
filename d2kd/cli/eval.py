"""Evaluate a student on DATASETS.TEST. The teacher is neither needed nor built."""

import argparse
from typing import Optional, Sequence

from .common import command_parser
from .train import parse_run_args, run

EXAMPLES = """
Examples:
  the weights of a run:
    d2kd eval --config-file configs/quickstart/pkd.yaml \\
        MODEL.WEIGHTS output/quickstart/pkd/model_final.pth
  its last checkpoint, whatever its name:
    d2kd eval --config-file configs/quickstart/pkd.yaml --resume
  the teacher of the quickstart, a plain detector:
    d2kd eval --config-file configs/quickstart/teacher.yaml \\
        MODEL.WEIGHTS configs/quickstart/teacher.pth
"""


def main(argv: Optional[Sequence[str]] = None) -> None:
    run(parse_args(argv))


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("d2kd eval", __doc__, EXAMPLES)
    parser.set_defaults(eval_only=True)
    return parse_run_args(parser, argv, "take the last checkpoint in OUTPUT_DIR")
