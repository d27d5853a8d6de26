#!/usr/bin/env python
"""
Draw what a student learns from its teacher, as one PNG per image of the test set: the image with
its ground truth, and for each pair of pyramid levels where the teacher attends, what the heads
mask, and how strongly teacher and student respond.

TensorBoard shows the same picture during training: VIS_PERIOD 500 draws one every 500 iterations.
"""

import argparse
import logging
import os
from itertools import islice
from typing import Any, Dict, Iterator, List, Optional, Sequence

import cv2
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, get_detection_dataset_dicts
from detectron2.data.detection_utils import build_augmentation
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from detectron2.utils.logger import setup_logger

from d2kd import Distiller, load_config, student_config
from d2kd.checkpoint import PlainCheckpointer
from d2kd.data import register_datasets
from d2kd.engine.hooks import seed_everything
from d2kd.engine.preflight import check_config
from d2kd.engine.stages import plan_stages
from d2kd.panel import class_names, draw_panel
from d2kd.plugin import import_file

logger = logging.getLogger("d2kd.draw_distillation")

EXAMPLE = """
Example: a run of the quickstart, and what it has learnt
    python train_net.py --config-file configs/quickstart/mgd.yaml
    python tools/draw_distillation.py --config-file configs/quickstart/mgd.yaml \\
        --weights output/quickstart/mgd/model_final.pth --output output/quickstart/mgd/pictures

How to read a picture: the outlines are the ground truth. A map's colours run from its own lowest to
its own highest value, which are written above it; so compare patterns by colour, and strength by
these numbers. Random masks are drawn anew for the picture. Where DISTILL.STAGES has several stages,
teacher and heads are those of the last.
"""


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    setup_logger(name="d2kd")
    for path in args.plugin:  # before the config, to which a head adds its keys
        import_file(path)
    cfg = load_config(args.config_file, args.opts)
    if cfg.MODEL.META_ARCHITECTURE != "Distiller" or not cfg.DISTILL.ENABLED:
        raise ValueError(f"{args.config_file} trains a student alone: there is no teacher to draw.")
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty: it names the images to draw.")
    check_config(cfg)
    cfg = plan_stages(cfg)[-1].cfg
    register_datasets(cfg, student_config(cfg).MODEL.META_ARCHITECTURE, parts=("TEST",))
    distiller = build_model(cfg)
    load_weights(distiller, args.weights)
    draw_distillation(distiller, cfg, args.output, args.images)


def load_weights(distiller: Distiller, path: str) -> None:
    """
    Load the student and, from a training checkpoint, the heads.

    Raises:
        ValueError: a file that is no checkpoint, or one of another student, teacher or heads
    """
    checkpointer = PlainCheckpointer(distiller)
    rest = checkpointer.load(path, checkpointables=["teacher"])
    if checkpointer.missing_keys:
        raise ValueError(
            f"--weights: {path!r} is of another student: it lacks {checkpointer.missing_keys[0]!r} "
            "of the config's, or has it in another shape."
        )
    if "distill_heads" not in rest:
        logger.warning(f"{path} is a student alone: adapters and generators are untrained.")
        return
    try:
        distiller.heads.load_state_dict(rest["distill_heads"])
    except RuntimeError as error:
        raise ValueError(f"--weights: {path!r} is of a run with other heads: {error}") from error


@torch.no_grad()
def draw_distillation(distiller: Distiller, cfg: CfgNode, output: str, images: int) -> None:
    """
    Args:
        output: folder, which receives <name of the image>.png
        images: number of images, from the first one of the test set on
    """
    distiller.train()
    for module in distiller.modules():
        if isinstance(module, _BatchNorm):
            module.eval()  # one image alone has other statistics than the batches of the run
    seed_everything(max(cfg.SEED, 0))  # the same random masks whenever it is drawn
    os.makedirs(output, exist_ok=True)
    chosen = list(islice(samples(cfg), images))
    names = class_names(cfg.DATASETS.TEST)  # known once the data set is read
    for sample in chosen:
        with EventStorage():  # of iteration 0: heads that STOP_ITER has ended are drawn too
            distiller([sample])
        stem = os.path.splitext(os.path.basename(sample["file_name"]))[0]
        path = os.path.join(output, f"{stem}.png")
        if not cv2.imwrite(path, draw_panel(distiller, class_names=names)[..., ::-1]):
            raise OSError(f"Cannot write {path}")
        logger.info(f"Wrote {path}")


def samples(cfg: CfgNode) -> Iterator[Dict[str, Any]]:
    """The test set with its ground truth, at test size."""
    augmentations = build_augmentation(cfg, is_train=False)
    mapper = DatasetMapper(cfg, is_train=True, augmentations=augmentations)
    dicts: List[Dict[str, Any]] = get_detection_dataset_dicts(
        [cfg.DATASETS.TEST[0]], filter_empty=False
    )
    return map(mapper, dicts)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="YAML of the run")
    parser.add_argument(
        "--weights",
        required=True,
        metavar="CHECKPOINT",
        help="of the run, such as model_final.pth; a plain student has untrained heads",
    )
    parser.add_argument("--output", required=True, metavar="FOLDER", help="where PNGs are written")
    parser.add_argument("--images", type=int, default=4, help="number of images (default: 4)")
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="FILE", help="as for train_net.py"
    )
    parser.add_argument("opts", nargs="*", help="config overrides: KEY VALUE ...")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
