"""
A contact sheet of the built-in shapes:

    python -m d2kd.data.preview preview.png DATASETS.SHAPES.CLUTTER 20

The upper half shows plain images, the lower half other images with their boxes and classes.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from typing import Optional, Sequence

import cv2
import numpy as np

from detectron2.utils.logger import setup_logger

from ..cli.common import command_parser
from ..config import load_config
from ..panel.tiles import WHITE, annotate, write_picture
from ..utils.command_line import add_overrides, count, parse_command_line, picture
from ..utils.user_mistakes import run_command
from .shapes import make_shapes


def contact_sheet(folder: str, rows: int, columns: int, zoom: int) -> np.ndarray:
    """
    Args:
        folder: with `annotations.json` and `images`
        rows: number of rows; half of them, rounded down, are drawn without boxes

    Returns:
        (H, W, 3) uint8 BGR
    """
    with open(os.path.join(folder, "annotations.json")) as f:
        content = json.load(f)
    names = {c["id"]: c["name"] for c in content["categories"]}
    by_image = defaultdict(list)
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    tiles = []
    for i, entry in enumerate(content["images"][: rows * columns]):
        tile = cv2.imread(os.path.join(folder, "images", entry["file_name"]))
        tile = cv2.resize(tile, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC)
        if i >= rows // 2 * columns:
            tile = annotate(tile, by_image[entry["id"]], names, zoom)
        tiles.append(cv2.copyMakeBorder(tile, 2, 2, 2, 2, cv2.BORDER_CONSTANT, value=WHITE))
    # A set smaller than the sheet leaves white tiles.
    tiles += [np.full_like(tiles[0], 255)] * (rows * columns - len(tiles))
    return np.vstack([np.hstack(tiles[r * columns : (r + 1) * columns]) for r in range(rows)])


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("python -m d2kd.data.preview", __doc__, "")
    parser.add_argument("output", type=picture, help="image file to write, such as preview.png")
    parser.add_argument("--split", choices=("train", "val"), default="val")
    parser.add_argument("--rows", type=count, default=4)
    parser.add_argument("--columns", type=count, default=7)
    parser.add_argument("--zoom", type=count, default=2, help="screen pixels per image pixel")
    add_overrides(parser, "config overrides, such as DATASETS.SHAPES.SEED 1")
    return parse_command_line(parser, argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    setup_logger(name="d2kd")
    cfg = load_config(opts=args.opts)
    sheet = contact_sheet(make_shapes(cfg, args.split), args.rows, args.columns, args.zoom)
    write_picture(args.output, sheet[..., ::-1])
    print(f"Wrote {args.output}, {sheet.shape[1]} x {sheet.shape[0]} pixels")


if __name__ == "__main__":
    sys.exit(run_command("python -m d2kd.data.preview", main))
