"""Train or evaluate a student, alone or with a teacher, from a YAML config."""

import argparse
import os
import shlex
import sys
from contextlib import contextmanager
from typing import Iterator, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from ..engine import evaluate, launch, train
from ..engine.facts import hold_facts, write_fact
from ..utils.atomic_file import atomic_write, check_writable, explain_full_disk
from ..utils.command_line import parse_command_line
from .common import add_config_options, command_parser, import_plugins, read_config

EXAMPLES = """
Examples:
  the student alone, then with a teacher, on the built-in data:
    d2kd train --config-file configs/quickstart/student.yaml
    d2kd train --config-file configs/quickstart/pkd.yaml
  go on with an interrupted run:
    d2kd train --config-file configs/quickstart/pkd.yaml --resume
  evaluate a student (the teacher is not needed):
    d2kd eval --config-file configs/quickstart/pkd.yaml \\
        MODEL.WEIGHTS output/quickstart/pkd/model_final.pth
  two stages in one run:
    d2kd train --config-file configs/quickstart/dfmsd_stages.yaml
  8 GPUs and another loss weight:
    d2kd train --config-file configs/COCO/RetinaNet/mgd_R_50_FPN_R_101_2x.yaml \\
        --num-gpus 8 DISTILL.MGD.LOSS_WEIGHT 1e-5
  2 processes on the CPU:
    d2kd train --config-file configs/quickstart/pkd.yaml --num-gpus 2 MODEL.DEVICE cpu

A method's keys are under DISTILL.<METHOD>: d2kd heads MGD prints them, with defaults and what they
are for; d2kd keys DISTILL prints those that methods have in common.
"""


def main(argv: Optional[Sequence[str]] = None) -> None:
    run(parse_args(argv))


def run(args: argparse.Namespace) -> None:
    """Start the processes that a command line asks for."""
    cfg = read_config(args)
    launch(
        work,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        device=cfg.MODEL.DEVICE,
        args=(args, cfg),
    )


def work(args: argparse.Namespace, cfg: CfgNode) -> None:
    """In every process."""
    import_plugins(args)
    cfg.freeze()
    task = evaluate if args.eval_only else train
    results = task(cfg, args.resume, on_checked=lambda: prepare_output(cfg, args))
    if comm.is_main_process() and args.eval_only:
        verify_results(cfg, results)


def prepare_output(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Begin the logs, now that the config is known to be sound."""
    check_writable(cfg.OUTPUT_DIR)
    with explain_full_disk(cfg.OUTPUT_DIR), _config_kept(cfg.OUTPUT_DIR):
        default_setup(cfg, args)
    # Detectron2 gives a handler to its own logger only.
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="d2kd")
    if not args.eval_only:
        hold_facts(cfg.OUTPUT_DIR)
        write_fact(cfg.OUTPUT_DIR, "command", line=args.command, resume=args.resume)


@contextmanager
def _config_kept(folder: str) -> Iterator[None]:
    """Detectron2 writes config.yaml at an evaluation too, and before a run is refused."""
    path = os.path.join(folder, "config.yaml")
    aside, is_there = f"{path}.kept", comm.is_main_process() and os.path.isfile(path)
    if is_there:
        # Copied before, and renamed after, for which a disk that is full by then needs no room.
        with open(path) as file, atomic_write(aside, "w") as copy:
            copy.write(file.read())
    try:
        yield
    finally:
        if is_there:
            os.replace(aside, path)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("d2kd train", __doc__, EXAMPLES)
    parser.add_argument("--eval-only", action="store_true", help="the same as d2kd eval")
    resume = "go on from the last checkpoint in OUTPUT_DIR; with --eval-only evaluate it"
    return parse_run_args(parser, argv, resume)


def parse_run_args(
    parser: argparse.ArgumentParser, argv: Optional[Sequence[str]], resume: str
) -> argparse.Namespace:
    """
    Add the options of a run, and parse.

    Args:
        resume: what --resume does, for --help
    """
    add_config_options(parser, required=False)
    add = parser.add_argument
    add("--resume", action="store_true", help=resume)
    add(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="processes on this machine, one per GPU; with MODEL.DEVICE cpu on the CPU",
    )
    add("--num-machines", type=int, default=1, metavar="N", help="default: 1")
    add("--machine-rank", type=int, default=0, metavar="N", help="of this machine, from 0")
    add(
        "--dist-url",
        default="auto",
        metavar="URL",
        help="of the main process, tcp://<main machine>:<port>; found by itself on one machine",
    )
    args = parse_command_line(parser, argv)
    args.command = shlex.join([*parser.prog.split(), *(sys.argv[1:] if argv is None else argv)])
    if args.num_gpus < 1 or args.num_machines < 1:
        parser.error(
            f"--num-gpus {args.num_gpus} --num-machines {args.num_machines}: both count processes, "
            "at least 1; on a CPU, too"
        )
    if not 0 <= args.machine_rank < args.num_machines:
        parser.error(
            f"--machine-rank {args.machine_rank}: of --num-machines {args.num_machines} the last "
            f"has {args.num_machines - 1}"
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        parser.error("--num-machines needs --dist-url tcp://<main machine>:<port>")
    return args
