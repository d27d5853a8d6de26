"""
Draw what detectors see, side by side: a row per image of the test set, ground truth first.

The detectors run as plain Detectron2 students, from their YAML and checkpoint.
"""

import argparse
from typing import Any, Dict, List, Optional, Sequence, Tuple

import cv2
import numpy as np

from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.utils.visualizer import ColorMode, VisImage, Visualizer

from ..checkpoint import load_whole_detector
from ..config import load_config, student_config
from ..data import class_names, register_datasets
from ..data.class_lists import num_classes
from ..engine.preflight.check_config import check_config
from ..panel.tiles import write_picture
from ..utils.command_line import add_overrides, count, parse_command_line, picture
from .common import add_plugin_option, command_parser, import_plugins

EXAMPLE = """
Example: a student of the quickstart beside its teacher
    d2kd draw-detections detections.png \\
        --detector teacher configs/quickstart/teacher.yaml configs/quickstart/teacher.pth \\
        --detector student configs/quickstart/pkd.yaml output/quickstart/pkd/model_final.pth
"""
Panel = Tuple[str, CfgNode, str]  # title, config, weights
WIDTH, GAP = 288, 2  # of a picture and of the space around it, pixels


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    import_plugins(args)
    panels = [(title, load_config(x, args.opts), weights) for title, x, weights in args.detector]
    draw_detections(panels, args.rows, args.threshold, args.path)
    print(f"Wrote {args.path}")


def draw_detections(panels: Sequence[Panel], rows: int, threshold: float, path: str) -> None:
    """
    Args:
        panels: the detectors, left to right; on the test set of the first
        rows: number of images
        threshold: lowest score that is drawn
        path: picture to write

    Raises:
        ValueError, OSError: a config or weights that are not sound, or nothing to draw on
    """
    configs = [student_config(cfg) for _, cfg, _ in panels]
    for (title, _, _), cfg in zip(panels, configs):
        try:
            check_config(cfg, evaluation=True)
        except ValueError as error:
            raise ValueError(f"--detector {title}: {error}") from error
        if cfg.MODEL.LOAD_PROPOSALS:
            raise ValueError(
                f"--detector {title}: MODEL.LOAD_PROPOSALS is True: it needs proposals with each "
                "image, and is given images alone."
            )
    if not configs[0].DATASETS.TEST:
        raise ValueError(
            f"--detector {panels[0][0]}: DATASETS.TEST is empty: that of the first detector names "
            "the images to draw."
        )
    register_datasets(configs[0], configs[0].MODEL.META_ARCHITECTURE, parts=("TEST",))
    name = configs[0].DATASETS.TEST[0]
    images = get_detection_dataset_dicts([name])
    images = images[:: max(len(images) // rows, 1)][:rows]
    shown = MetadataCatalog.get(name)
    canvases = [_canvas(x, shown) for x in images]
    truth = [canvas.draw_dataset_dict(_drawable(x)) for canvas, x in zip(canvases, images)]
    columns = [_column("ground truth", truth)]
    for (title, _, weights), cfg in zip(panels, configs):
        cfg.MODEL.WEIGHTS = ""  # Detectron2 would run what is in the file, and load a part of it
        predictor, drawn = DefaultPredictor(cfg), []
        load_whole_detector(predictor.model, weights, f"--detector {title}", cfg)
        names = _names(cfg, shown)
        for record in images:
            instances = predictor(read_image(record["file_name"], "BGR"))["instances"].to("cpu")
            instances = instances[instances.scores > threshold]
            drawn.append(_canvas(record, names).draw_instance_predictions(instances))
        columns.append(_column(title, drawn))
    write_picture(path, np.hstack(columns))


def _drawable(record: Dict[str, Any]) -> Dict[str, Any]:
    """
    Without masks unless all objects have one: Detectron2 draws those of an image where the first
    object has one, and fails at an object without.
    """
    objects = record.get("annotations", ())
    if all("segmentation" in x for x in objects):
        return record
    boxes = [{k: v for k, v in x.items() if k != "segmentation"} for x in objects]
    return {**record, "annotations": boxes}


def _names(cfg: CfgNode, shown: Metadata) -> Metadata:
    """
    What a detector's classes are called: as in its own config, since they need not be those of the
    set that is shown; where that does not tell, as there if they are as many, else by number.
    """
    count = num_classes(cfg, cfg.MODEL.META_ARCHITECTURE)
    for names in (class_names(cfg), shown.get("thing_classes", ())):
        if names and count in (None, len(names)):
            return Metadata(thing_classes=list(names))
    return Metadata()


def _canvas(record: Dict[str, Any], names: Metadata) -> Visualizer:
    image = read_image(record["file_name"], "RGB")
    scale = WIDTH / image.shape[1]
    return Visualizer(image, names, scale=scale, instance_mode=ColorMode.IMAGE)


def _column(title: str, drawn: List[VisImage]) -> np.ndarray:
    """Returns: a title over pictures of one width, (H, W, 3) RGB."""
    head = np.full((28, WIDTH, 3), 255, dtype=np.uint8)
    cv2.putText(head, title, (8, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (0, 0, 0), 1, cv2.LINE_AA)
    pictures = [head]
    for image in (x.get_image() for x in drawn):
        pictures.append(cv2.resize(image, (WIDTH, WIDTH * image.shape[0] // image.shape[1])))
    return np.vstack([cv2.copyMakeBorder(x, *[GAP] * 4, 0, value=(255,) * 3) for x in pictures])


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("d2kd draw-detections", __doc__, EXAMPLE)
    parser.add_argument("path", type=picture, help="picture to write, such as detections.png")
    parser.add_argument(
        "--detector",
        nargs=3,
        action="append",
        required=True,
        metavar=("TITLE", "CONFIG", "WEIGHTS"),
        help="may be repeated",
    )
    parser.add_argument("--rows", type=count, default=4, help="number of images")
    parser.add_argument("--threshold", type=float, default=0.3, help="lowest score drawn")
    add_plugin_option(parser)
    add_overrides(parser)
    return parse_command_line(parser, argv)
