#!/usr/bin/env python
"""Train or evaluate a student, alone or with a teacher, from a YAML config."""

import argparse
from typing import Optional, Sequence

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from d2kd import load_config
from d2kd.config.unread import refuse_unread
from d2kd.engine import evaluate, launch, train
from d2kd.utils.atomic_file import check_writable
from d2kd.utils.command_line import parse_command_line
from d2kd.utils.plugin import import_file

EXAMPLES = """
Examples:
  the student alone, then with a teacher, on the built-in data:
    python train_net.py --config-file configs/quickstart/student.yaml
    python train_net.py --config-file configs/quickstart/pkd.yaml
  go on with an interrupted run:
    python train_net.py --config-file configs/quickstart/pkd.yaml --resume
  evaluate a student (the teacher is not needed):
    python train_net.py --config-file configs/quickstart/pkd.yaml --eval-only \\
        MODEL.WEIGHTS output/quickstart/pkd/model_final.pth
  two stages in one run:
    python train_net.py --config-file configs/quickstart/dfmsd_stages.yaml
  8 GPUs and another loss weight:
    python train_net.py --config-file configs/COCO/RetinaNet/mgd_R_50_FPN_R_101_2x.yaml \\
        --num-gpus 8 DISTILL.MGD.LOSS_WEIGHT 1e-5
  2 processes on the CPU:
    python train_net.py --config-file configs/quickstart/pkd.yaml --num-gpus 2 MODEL.DEVICE cpu

A method's keys are under DISTILL.<METHOD>: python -m d2kd.heads MGD prints them, with defaults and
what they are for. The common ones are explained in d2kd/config/distill_keys.py.
"""


def main(args: argparse.Namespace, cfg: CfgNode) -> None:
    """In every process."""
    import_plugins(args)
    cfg.freeze()
    work = evaluate if args.eval_only else train
    results = work(cfg, args.resume, on_checked=lambda: prepare_output(cfg, args))
    if comm.is_main_process() and args.eval_only:
        verify_results(cfg, results)


def prepare_output(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Write the config and begin the logs, now that the config is known to be sound."""
    check_writable(cfg.OUTPUT_DIR)
    default_setup(cfg, args)
    # Detectron2 gives a handler to its own logger only.
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="d2kd")


def import_plugins(args: argparse.Namespace) -> None:
    for path in args.plugin:
        import_file(path)


def setup(args: argparse.Namespace) -> CfgNode:
    import_plugins(args)  # before the config, to which a head adds its keys
    cfg = load_config(args.config_file, args.opts)
    refuse_unread(cfg, args.opts, "The command line")
    return cfg


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = default_argument_parser(epilog=EXAMPLES)
    parser.description = __doc__
    parser.set_defaults(dist_url="auto")
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="Python file that registers heads, views or detectors of yours; may be repeated",
    )
    args = parse_command_line(parser, argv)
    if args.num_machines > 1 and args.dist_url == "auto":
        parser.error("--num-machines needs --dist-url tcp://<main machine>:<port>")
    return args


if __name__ == "__main__":
    args = parse_args()
    cfg = setup(args)
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        device=cfg.MODEL.DEVICE,
        args=(args, cfg),
    )
