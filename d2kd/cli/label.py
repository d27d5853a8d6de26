"""
Label images with a teacher: write those of its detections that can be trusted, in COCO's format.

For each class, these are the detections from a score on that is chosen on a labelled set, the first
of DATASETS.TEST: the lowest score at which the precision there is at least --precision, at an IoU
of 0.5. A class that does not reach it gets no labels.
"""

import argparse
import logging
import math
import os
from collections import Counter
from typing import Any, Dict, List, Optional, Sequence

from detectron2.utils.logger import setup_logger

from .. import labelling
from ..data.find_images import find_images
from ..labelling import LabelledSet
from ..utils.atomic_file import check_writable, write_json
from ..utils.checks import check_range
from ..utils.command_line import parse_command_line
from .common import add_config_options, command_parser, read_config

logger = logging.getLogger(__name__)

EXAMPLES = """
Examples:
  with a detector that you have trained:
    d2kd label --config-file teacher.yaml --images unlabelled --output labels.json \\
        MODEL.WEIGHTS output/quickstart/teacher/model_final.pth
  with the teacher of a distillation; and see on which labelled images it is wrong:
    d2kd label --config-file run.yaml --teacher --images unlabelled --output labels.json --worst 24

The last lines that are printed are the YAML that trains on the labels.
"""


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    for name in ("d2kd", "detectron2"):
        setup_logger(name=name)
    cfg = read_config(args)
    check_args(args)
    images = find_images(args.images, args.json)
    labelled = labelling.read_labelled_set(cfg)
    detector = labelling.load_detector(cfg, args.teacher)
    categories = labelling.category_ids(cfg, detector, labelled, args.teacher)
    if labelled.name in cfg.DATASETS.TRAIN:
        logger.warning(
            f"{labelled.name} is also in DATASETS.TRAIN: on images that a detector has learnt it "
            "is better than on others, so the thresholds are too low."
        )

    logger.info(f"Choosing thresholds on the {len(labelled.images)} images of {labelled.name}.")
    found = labelling.detect(detector, labelled.images, cfg, categories)
    gates = labelling.choose_gates(labelled, found, args.precision)
    for line in labelling.gate_warnings(gates, args.precision):
        logger.warning(line)
    logger.info(f"Labelling the {len(images)} images of {args.images}.")
    thresholds = {x.category_id: x.threshold for x in gates if x.threshold is not None}
    labels = labelling.detect(detector, images, cfg, categories, thresholds)
    if not labels:
        raise ValueError(
            f"--images: nothing in the {len(images)} images of {args.images} is detected with a "
            "score that is high enough. Nothing is written."
        )
    teacher = {"config_file": args.config_file, **detector.manifest}
    info = labelling.describe_labels(gates, labelled, args.precision, teacher)
    write_labels(args, info, labelled, images, labels)
    worst = worst_path(args.output)
    if labelling.write_worst(gates, labelled.images, args.worst, worst):
        logger.info(f"Wrote {worst}.json and {worst}.png")

    counts = Counter(x["category_id"] for x in labels)
    logger.info(f"By class, on {labelled.name}:\n{labelling.gate_table(gates, counts)}")
    yaml = labelling.training_yaml(cfg, args.output, args.images)
    logger.info(f"To train on the labels as well:\n{yaml}")


def check_args(args: argparse.Namespace) -> None:
    """
    Raises:
        ValueError, OSError: an option, or where they would be written
    """
    if not 0 < args.precision <= 1:
        raise ValueError(f"--precision must be above 0 and at most 1, got {args.precision}.")
    check_range("--worst", args.worst, 0, math.inf)
    if args.teacher and "MODEL.WEIGHTS" in args.opts[0::2]:
        raise ValueError("MODEL.WEIGHTS has no effect with --teacher; set DISTILL.TEACHER.WEIGHTS.")
    worst = [f"{worst_path(args.output)}.{x}" for x in ("json", "png")] if args.worst else []
    for path in (args.output, *worst):
        if os.path.exists(path):
            raise FileExistsError(f"--output: {path!r} exists. Remove it, or name another file.")
    check_writable(os.path.dirname(args.output) or ".", "--output")


def worst_path(output: str) -> str:
    """Of the list and the picture of --worst, without extension."""
    return f"{os.path.splitext(output)[0]}_worst"


def write_labels(
    args: argparse.Namespace,
    info: Dict[str, Any],
    labelled: LabelledSet,
    images: List[Dict[str, Any]],
    labels: List[Dict[str, Any]],
) -> None:
    with_labels = {x["image_id"] for x in labels}
    kept = [x for x in images if args.keep_empty or x["image_id"] in with_labels]
    content = labelling.label_json(info, labelled.categories, kept, labels, args.images)
    write_json(args.output, content)
    what = "kept" if args.keep_empty else "left out, as they may hold objects (--keep-empty)"
    logger.info(
        f"Wrote {args.output}: {len(labels)} labels in {len(with_labels)} of {len(images)} images. "
        f"Images without a label are {what}."
    )


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("d2kd label", __doc__, EXAMPLES)
    add_config_options(parser)
    add = parser.add_argument
    add("--images", required=True, metavar="FOLDER", help="with the images to label")
    add("--json", default="", metavar="FILE", help="COCO's, lists which of them; default: all")
    add("--output", required=True, metavar="FILE", help="JSON to write")
    add(
        "--teacher",
        action="store_true",
        help="label with the teacher of DISTILL.TEACHER, not with MODEL.WEIGHTS",
    )
    add("--precision", type=float, default=0.9, help="wanted of each class (default: 0.9)")
    add("--keep-empty", action="store_true", help="write images without a label, too")
    add(
        "--worst",
        type=int,
        default=0,
        metavar="N",
        help="write the N labelled images with most errors, OUTPUT_worst.json and .png",
    )
    return parse_command_line(parser, argv)
