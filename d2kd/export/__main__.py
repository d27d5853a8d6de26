"""Export the student of a run for machines without d2kd, and prove that it works there."""

import argparse
import json
import os
import sys
from typing import Optional, Sequence

from ..config import load_config
from ..utils.command_line import add_overrides, parse_command_line
from ..utils.plugin import import_file
from .graph import FORMATS, export_graph
from .student import export_student, find_weights, why_no_yaml
from .verify import verify

EPILOG = """
The folder receives student.pth (weights), student.yaml (for stock Detectron2) and report.json. The
proof is a fresh process in which d2kd cannot be imported: it builds the YAML, loads the weights
without a missing or unexpected key, and must detect in fixed images, to the bit, what the run's
student detects. Exit code 0: verified, and so are the graphs of --formats; 1: not. A student that
Detectron2 cannot build from YAML (FCOS, Swin, a plug-in) has weights and a TorchScript graph alone.

examples:
  python -m d2kd.export --config-file configs/quickstart/pkd.yaml --output exported
  python -m d2kd.export --config-file run.yaml --weights output/run/model_0004999.pth --output now
  python -m d2kd.export --config-file run.yaml --output exported --formats torchscript onnx
"""


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    for path in args.plugin:
        import_file(path)
    cfg = load_config(args.config_file, args.opts)
    weights = args.weights or find_weights(cfg)
    reason = why_no_yaml(cfg)
    if reason and "torchscript" not in args.formats:
        sys.exit(f"There is no stock YAML of this student: {reason}. Add --formats torchscript.")
    report = {"config_file": args.config_file, "weights": weights}
    export_student(cfg, weights, args.output)
    report.update({"no_yaml": reason} if reason else verify(cfg, weights, args.output))
    for name in args.formats:
        report[name] = export_graph(cfg, weights, name, args.output)
    with open(os.path.join(args.output, "report.json"), "w") as file:
        json.dump(report, file, indent=2)
    print(json.dumps(report, indent=2))
    graphs = [report[name] for name in args.formats]
    proved = [reason or report["verified"], *(x.get("verified") for x in graphs)]
    sys.exit(0 if all(proved) else 1)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m d2kd.export",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help="YAML of the run")
    add("--weights", default="", metavar="FILE", help="default: the last in OUTPUT_DIR")
    add("--output", required=True, metavar="FOLDER", help="is created")
    add("--formats", nargs="+", choices=FORMATS, default=[], help="graphs beside the weights")
    add("--plugin", action="append", default=[], metavar="FILE", help="as for train_net.py")
    add_overrides(parser)
    return parse_command_line(parser, argv)


if __name__ == "__main__":
    main()
