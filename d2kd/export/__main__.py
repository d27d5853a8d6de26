"""Export the student of a run for machines without d2kd, and verify that it works there."""

import argparse
import json
import sys
from pathlib import Path
from typing import Optional, Sequence

from ..cli.common import add_config_options, command_parser, read_config
from ..utils.atomic_file import atomic_write, check_writable
from ..utils.command_line import parse_command_line
from ..utils.user_mistakes import run_command
from .graph import FORMATS, export_graph
from .student import export_student, find_weights, why_no_yaml
from .verify import verify

EPILOG = """
The output folder gets student.pth (weights), student.yaml (for stock Detectron2) and report.json.
They are verified in a fresh process in which d2kd cannot be imported: it builds the YAML, loads the
weights without missing or unexpected keys, and must reproduce the detections of the run's student
on fixed images, to the bit. Exit code 0: verified, including the graphs of --formats; 1: not. A
student that Detectron2 cannot build from YAML (FCOS, RepPoints, Swin, timm, a plug-in) is exported
as weights and graphs only.

Examples:
  d2kd export --config-file configs/quickstart/pkd.yaml --output exported
  d2kd export --config-file run.yaml --weights output/run/model_0004999.pth --output now
  d2kd export --config-file run.yaml --output exported --formats torchscript onnx
"""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """
    Returns:
        0 if everything that was written is verified, else 1
    """
    args = parse_args(argv)
    cfg = read_config(args)
    weights = args.weights or find_weights(cfg)
    check_writable(args.output, "--output")
    reason = why_no_yaml(cfg)
    if reason and not args.formats:
        raise ValueError(
            f"This student has no stock YAML: {reason}. Add a graph that runs without one, with "
            "--formats torchscript, onnx or both."
        )
    if cfg.MODEL.LOAD_PROPOSALS and args.formats:
        raise ValueError(
            "--formats: a graph is given an image alone, but MODEL.LOAD_PROPOSALS is True: this "
            "student needs proposals with it. Leave --formats out."
        )
    proof = Path(args.output, "report.json")
    proof.unlink(missing_ok=True)  # of an earlier export, whose weights are replaced now
    report = {"config_file": args.config_file, "weights": weights}
    export_student(cfg, weights, args.output)
    report.update({"no_yaml": reason} if reason else verify(cfg, weights, args.output))
    for name in args.formats:
        report[name] = export_graph(cfg, weights, name, args.output)
    with atomic_write(str(proof), "w") as file:
        json.dump(report, file, indent=2)
    print(json.dumps(report, indent=2))
    graphs = [report[name] for name in args.formats]
    proved = [reason or report["verified"], *(x.get("verified") for x in graphs)]
    return 0 if all(proved) else 1


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("d2kd export", __doc__, EPILOG)
    add_config_options(parser)
    add = parser.add_argument
    add("--weights", default="", metavar="FILE", help="default: the last in OUTPUT_DIR")
    add("--output", required=True, metavar="FOLDER", help="is created")
    add("--formats", nargs="+", choices=FORMATS, default=[], help="graphs beside the weights")
    return parse_command_line(parser, argv)


if __name__ == "__main__":
    sys.exit(run_command("d2kd export", main))
