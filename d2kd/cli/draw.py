"""
Draw what a student learns from its teacher, as one PNG per image of the test set: the image with
its ground truth, and for each pair of pyramid levels where the teacher attends, what the heads
mask, and how strongly teacher and student respond. Of a head that weighs the student's levels, such
as SGFI, level_weights.png shows the mean weights by size of the regions; they are printed too.

TensorBoard shows the same picture during training: VIS_PERIOD 500 draws one every 500 iterations.
"""

import argparse
import logging
from itertools import islice
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Sequence

import numpy as np
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger

from .. import panel
from ..checkpoint import PlainCheckpointer, check_is_file
from ..config import student_config
from ..data import class_names, register_datasets
from ..data.mapper import CheckedMapper
from ..distiller import Distiller
from ..engine.hooks import seed_everything
from ..engine.preflight.check_config import check_config
from ..panel.tiles import write_picture
from ..utils.atomic_file import check_writable
from ..utils.command_line import parse_command_line
from ..utils.distils import distils
from ..utils.packaged import find_file
from .common import add_config_options, command_parser, read_config

logger = logging.getLogger(__name__)

EXAMPLE = """
Example: a run of the quickstart, and what it has learnt
    d2kd train --config-file configs/quickstart/mgd.yaml
    d2kd draw --config-file configs/quickstart/mgd.yaml \\
        --weights output/quickstart/mgd/model_final.pth --output output/quickstart/mgd/pictures

How to read a picture: the outlines are the ground truth. A map's colours run from its own lowest to
its own highest value, which are written above it; so compare patterns by colour, and strength by
these numbers. Random masks are drawn anew for the picture. Where DISTILL.STAGES has several stages,
teacher and heads are those of the last.
"""


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    setup_logger(name="d2kd")
    cfg = read_config(args)
    if not distils(cfg):
        raise ValueError(f"{args.config_file} trains a student alone: there is no teacher to draw.")
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty: it names the images to draw.")
    check_writable(args.output, "--output")
    cfg = check_config(cfg)[-1].cfg
    register_datasets(cfg, student_config(cfg).MODEL.META_ARCHITECTURE, parts=("TEST",))
    distiller = build_model(cfg)
    load_weights(distiller, args.weights)
    draw_distillation(distiller, cfg, args)


def load_weights(distiller: Distiller, path: str) -> None:
    """
    Load the student and, from a training checkpoint, the heads.

    Raises:
        ValueError: a file that is no checkpoint, or one of another student, teacher or heads
    """
    path = find_file(path)
    check_is_file(path, "--weights")
    checkpointer = PlainCheckpointer(distiller)
    rest = checkpointer.load(path, checkpointables=["teacher"])
    if checkpointer.missing_keys:
        raise ValueError(
            f"--weights: {path!r} is of another student: it lacks {checkpointer.missing_keys[0]!r} "
            f"of the config's, or has it in another shape. Found: {checkpointer.found}."
        )
    if "distill_heads" not in rest:
        logger.warning(f"{path} is a student alone: adapters and generators are untrained.")
        return
    try:
        distiller.heads.load_state_dict(rest["distill_heads"])
    except RuntimeError as error:
        raise ValueError(f"--weights: {path!r} is of a run with other heads: {error}") from error


@torch.no_grad()
def draw_distillation(distiller: Distiller, cfg: CfgNode, args: argparse.Namespace) -> None:
    """Write the pictures that the command line asks for, from the first image of the test set."""
    distiller.train()
    for module in distiller.modules():
        if isinstance(module, _BatchNorm):
            module.eval()  # one image alone has other statistics than the batches of the run
    seed_everything(max(cfg.SEED, 0))  # the same random masks whenever it is drawn
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    tables = panel.level_tables(distiller) if args.level_images else {}
    count = max(args.images, args.level_images if tables else 0)
    if count < 1:
        raise ValueError(f"--images {args.images}: there is nothing to draw. Ask for 1 or more.")
    chosen = islice(samples(cfg), count)
    names, written = class_names(cfg), set()
    for i, sample in enumerate(chosen):
        with EventStorage():  # of iteration 0: heads that STOP_ITER has ended are drawn too
            distiller([sample])
        if i < args.images:
            path = output / f"{Path(sample['file_name']).stem}.png"
            if path in written:  # one name in two folders
                path = path.with_name(f"{path.stem}_{sample['image_id']}.png")
            written.add(path)
            write(path, panel.draw_panel(distiller, class_names=names))
        if i < args.level_images:
            panel.add_level_weights(tables, distiller)
    if tables:
        for name, table in tables.items():
            logger.info(f"{name}: mean weights of the student's levels (name / stride)\n{table}")
        write(output / "level_weights.png", panel.draw_level_weights(tables))


def write(path: Path, picture: np.ndarray) -> None:
    write_picture(path, picture)
    logger.info(f"Wrote {path}")


def samples(cfg: CfgNode) -> Iterator[Dict[str, Any]]:
    """The test set with its ground truth, at test size."""
    augmentations = build_augmentation(cfg, is_train=False)
    mapper = CheckedMapper(cfg, is_train=True, augmentations=augmentations)
    files = cfg.DATASETS.PROPOSAL_FILES_TEST[:1] if cfg.MODEL.LOAD_PROPOSALS else None
    names = cfg.DATASETS.TEST[:1]
    return map(mapper, get_detection_dataset_dicts(names, filter_empty=False, proposal_files=files))


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("d2kd draw", __doc__, EXAMPLE)
    add_config_options(parser)
    add = parser.add_argument
    add("--weights", required=True, metavar="FILE", help="of the run, such as model_final.pth")
    add("--output", required=True, metavar="FOLDER", help="where PNGs are written")
    add("--images", type=int, default=4, help="number of images (default: 4)")
    add("--level-images", type=int, default=100, help="images for level_weights.png (default: 100)")
    return parse_command_line(parser, argv)
