#!/usr/bin/env python
"""
Keep of a checkpoint what inference needs: the model, its weights as float16, half a float32's size.

Detectron2 loads the result as any other; the weights become float32 again, rounded.
"""

import argparse
import os
import sys
from typing import Optional, Sequence

import torch

from d2kd.checkpoint import check_is_file
from d2kd.cli.common import command_parser
from d2kd.utils.atomic_file import atomic_write
from d2kd.utils.sha256 import sha256_of
from d2kd.utils.user_mistakes import run_command
from d2kd.weights.safe_load import read_weights_file


def shrink(source: str, target: str) -> str:
    """
    Args:
        source: a checkpoint with "model"
        target: file to write

    Returns:
        sha256 of the written file

    Raises:
        ValueError: no checkpoint, or weights beyond what float16 holds
    """
    check_is_file(source, "source")
    model = read_weights_file(source)["model"]
    halves = {k: v.half() if v.is_floating_point() else v for k, v in model.items()}
    for key, value in halves.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise ValueError(f"{key} of {source} does not fit into float16")
    with atomic_write(target) as file:  # it may be the source
        torch.save({"model": halves}, file)
    return sha256_of(target)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("shrink_checkpoint.py", __doc__, "")
    parser.add_argument("source", help="checkpoint, such as output/run/model_final.pth")
    parser.add_argument("target", help="file to write")
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    digest = shrink(args.source, args.target)
    print(f"{args.target}: {os.path.getsize(args.target) / 1e6:.2f} MB, sha256 {digest}")


if __name__ == "__main__":
    sys.exit(run_command("shrink_checkpoint.py", main))
