#!/usr/bin/env python
"""Measure what distillation costs: seconds and memory of a training step, part by part."""

import argparse
import gc
import json
import os
import platform
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from tabulate import tabulate

import detectron2
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from benchmark_costs import head_costs
from benchmark_parts import PAIRS, Step, build_arms, build_config, options_in
from d2kd.cli.common import command_parser
from d2kd.utils.command_line import add_overrides, parse_command_line
from d2kd.utils.user_mistakes import run_command

Seconds = Dict[str, List[float]]
Spread = List[float]  # [median, min, max] over rounds

GUIDE = """
Every round runs each arm once, on the same batch, odd rounds in reverse order:
  student     forward, backward and optimizer step of the plain student          (a)
  teacher     the part the head reads, without gradients: the pyramid's
              features; "of NAME": and what it reads of each cell's predictions  (b)
  head NAME   forward, backward and optimizer step of the head alone, on
              recorded features                                                  (h)
  with NAME   the whole distillation step, as training runs it                   (c)
  look NAME   --look: the same step when DISTILL.LIVENESS looks at gradients     (l)
  ..., WORDS  --teacher: the teacher and the whole step, with these options of
              DISTILL.TEACHER                                                    (o)
A ratio is the median over rounds of the ratio within a round, then [min, max]. c/(a+b+h) - 1 is
what d2kd itself costs, c/(a+b) - 1 what d2kd and the method cost. RoI features and predictions that
a head asks of a teacher count as the head's, and so does drawing a dense student's regions. A queue
of past keys is full from the start, as it is in most of a run: the time of CKD is that of its
QUEUE_SIZE. --memory measures in processes of their own: the plain student without a teacher, and
each distillation step.

Of each head by itself:
  ms          its arm h, in milliseconds; of MGD: as a multiple of MGD's, where that is measured
  GFLOPs      1e9 operations of its convolutions and matrix products in a step, forward and
              backward, 2 for a multiply-add; nothing else is counted (torch 2.0: "-")
  parameters  their number; they are trained with the student and not delivered
  saved MiB   what its forward keeps for its backward: the tensors that autograd saves, each storage
              once, without parameters, buffers and what the detectors recorded anyway; nor what
              is computed again in the backward, as with SGFI's CHUNK_SIZE

A pair's detectors and optimizer, clipped gradients included, are those of configs/COCO/Base-*.yaml.
Weights are random and the learning rate is 0: the time depends on neither, and no file of weights
is needed or read. On a machine that others use, take --threads 1 --cpu-seconds.

examples:
  python tools/benchmark.py --pair faster_rcnn_R_101-R_18 --heads MGD PKD
  python tools/benchmark.py --size 800x1344 --images 8 --amp --memory
  python tools/benchmark.py --config-file configs/quickstart/pkd.yaml --json cost.json
  python tools/benchmark.py --pair faster_rcnn_R_101-R_18 --heads DKD ReviewKD ReviewKD+DKD
  python tools/benchmark.py --config-file configs/quickstart/pkd.yaml --size 96x96 --images 8 --look
  python tools/benchmark.py --heads PKD --teacher FOLD_NORMS CHANNELS_LAST FOLD_NORMS+CHANNELS_LAST
  python tools/benchmark.py --heads MGD DISTILL.MGD.MASK_RATIO 0.45
"""


# Measuring ----------------------------------------------------------------------------------------


def measure(steps: Dict[str, Step], args: argparse.Namespace) -> Seconds:
    """Seconds of every arm, a list with one number for each round."""
    clock = time.process_time if args.cpu_seconds else time.perf_counter
    seconds: Seconds = {name: [] for name in steps}
    for i in range(args.warmup + args.rounds):
        gc.collect()
        for name in reversed(list(steps)) if i % 2 else list(steps):
            torch.manual_seed(i)  # the same proposals in all arms of a round
            _synchronize()
            start = clock()
            steps[name]()
            _synchronize()
            if i >= args.warmup:
                seconds[name].append(clock() - start)
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@dataclass
class Measured:
    """
    `cfg`: of the run; `seconds`: of every arm; `teacher_arms`: head to the teacher's arm that it
    needs; `costs`: head to its head_costs(); `peak_mib`: of this process, on the GPU or resident
    on a CPU.
    """

    cfg: CfgNode
    seconds: Seconds
    teacher_arms: Dict[str, str]
    costs: Dict[str, Dict[str, Optional[int]]]
    peak_mib: float


def run(args: argparse.Namespace, arm: str = "") -> Measured:
    """Measure all arms and the heads, or a single arm and its memory: in a process of its own."""
    torch.set_num_threads(args.threads)
    with TemporaryDirectory() as folder, EventStorage():
        cfg = build_config(args, folder)
        cfg.DISTILL.ENABLED = arm != "student"
        arms = build_arms(cfg, args)
        steps = {name: build() for name, build in arms.items() if arm in ("", name)}
        seconds = measure(steps, args)
        names = [] if arm else args.heads or cfg.DISTILL.HEADS
        heads = {name: steps[f"head {name}"] for name in names}
        return Measured(
            cfg=cfg,
            seconds=seconds,
            teacher_arms={name: head.teacher_arm for name, head in heads.items()},
            costs={name: head_costs(head) for name, head in heads.items()},
            peak_mib=_peak_mib(),
        )


def _peak_mib() -> float:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def memory_of(args: argparse.Namespace) -> Dict[str, float]:
    """Peak MiB of the plain student and of each distillation step, each in a fresh process."""
    with TemporaryDirectory() as folder:
        heads = args.heads or build_config(args, folder).DISTILL.HEADS
    memory = {}
    for arm, own in {"student": heads, **{f"with {name}": [name] for name in heads}}.items():
        short = argparse.Namespace(**{**vars(args), "warmup": 1, "rounds": 3, "heads": own})
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            memory[arm] = pool.submit(run, short, arm).result().peak_mib
    return memory


# Reporting ----------------------------------------------------------------------------------------


def ratios_of(measured: Measured) -> Dict[str, Dict[str, Spread]]:
    """Head to the ratios of its whole step to the arms that make it up."""
    seconds, ratios = measured.seconds, {}
    for name, teacher in measured.teacher_arms.items():
        arms = [seconds[k] for k in ("student", teacher, f"head {name}", f"with {name}")]
        rounds = list(zip(*arms))
        ratios[name] = {
            "c/(a+b+h)": _spread([c / (a + b + h) for a, b, h, c in rounds]),
            "c/(a+b)": _spread([c / (a + b) for a, b, h, c in rounds]),
            "teacher share": _spread([b / c for a, b, h, c in rounds]),
        }
        if f"look {name}" in seconds:
            watched = zip(seconds[f"look {name}"], arms[-1])
            ratios[name]["l/c"] = _spread([look / c for look, c in watched])
        prefix = f"with {name}, "
        for arm in (x for x in seconds if x.startswith(prefix)):
            pairs = zip(seconds[arm], arms[-1])
            ratios[name][f"o/c {arm[len(prefix):]}"] = _spread([o / c for o, c in pairs])
    return ratios


def heads_of(measured: Measured) -> Dict[str, Dict[str, Any]]:
    """Head to what it costs by itself; a time is a Spread, what could not be measured None."""
    mgd = measured.seconds.get("head MGD")
    heads = {}
    for name, costs in measured.costs.items():
        own = measured.seconds[f"head {name}"]
        heads[name] = {
            "milliseconds": _spread([1000 * x for x in own]),
            "of MGD": _spread([x / y for x, y in zip(own, mgd)]) if mgd else None,
            **costs,
        }
    return heads


def _spread(rounds: Sequence[float]) -> Spread:
    return [median(rounds), min(rounds), max(rounds)]


def hardware(cfg: CfgNode) -> str:
    if cfg.MODEL.DEVICE.startswith("cuda"):
        return torch.cuda.get_device_name() + (", AMP" if cfg.SOLVER.AMP.ENABLED else "")
    cpu = platform.processor() or platform.machine()
    if os.path.isfile("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            cpu = next((x.split(": ")[1].strip() for x in file if x.startswith("model name")), cpu)
    return f"{cpu}, {torch.get_num_threads()} of {os.cpu_count()} threads"


def print_report(report: Dict[str, Any]) -> None:
    print(
        f"{report['pair']}: {report['images']} images of {report['size']}, {report['boxes']} boxes "
        f"each, {report['rounds']} rounds, {report['clock']} seconds\n{report['hardware']}; "
        f"torch {report['torch']}, detectron2 {report['detectron2']}\n"
    )
    memory = report["peak_mib"]
    arms = [
        (name, median(x), min(x), max(x), round(memory[name]) if name in memory else "-")
        for name, x in report["seconds"].items()
    ]
    print(tabulate(arms, ["arm", "seconds", "min", "max", "peak MiB"], floatfmt=".4f"), "\n")
    ratios = [(name, *map(_text, x.values())) for name, x in report["ratios"].items()]
    print(tabulate(ratios, ["head", *next(iter(report["ratios"].values()))]), "\n")
    columns = ["head", "ms", "of MGD", "GFLOPs", "parameters", "saved MiB"]
    heads = [_head_row(name, head) for name, head in report["heads"].items()]
    print(tabulate(heads, columns, disable_numparse=True, colalign=["left"] + ["right"] * 5))


def _head_row(name: str, head: Dict[str, Any]) -> List[str]:
    flops = head["flops"]
    return [
        name,
        _text(head["milliseconds"], digits=1),
        _text(head["of MGD"]) if head["of MGD"] else "-",
        "-" if flops is None else f"{flops / 1e9:.3f}",
        f"{head['parameters']:,}",
        f"{head['saved_bytes'] / 2**20:.2f}",
    ]


def _text(spread: Spread, digits: int = 3) -> str:
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*spread, d=digits)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("benchmark.py", __doc__, GUIDE)
    add = parser.add_argument
    add("--pair", choices=sorted(PAIRS), default="retinanet_R_101-R_50", help="teacher-student")
    add("--config-file", help="any distillation YAML, in place of --pair")
    add("--heads", nargs="+", metavar="NAME", help="A+B: both at once; default: those of the YAML")
    add("--size", type=_size, default=(320, 320), metavar="HxW", help="pixels; default 320x320")
    add("--images", type=_positive, default=2, help="per batch; default %(default)s")
    add("--boxes", type=_positive, default=4, help="per image; default %(default)s")
    add("--rounds", type=_positive, default=8, help="measured; default %(default)s")
    add("--warmup", type=_positive, default=2, help="rounds before; default %(default)s")
    add("--device", default="auto", help="auto (default), cpu or cuda")
    add("--amp", action="store_true", help="mixed precision, CUDA only")
    add("--threads", type=_positive, default=torch.get_num_threads(), help="of the CPU")
    add("--cpu-seconds", action="store_true", help="of this process, in place of the wall clock's")
    add("--memory", action="store_true", help="also measure peak memory")
    add("--look", action="store_true", help="also measure a look of DISTILL.LIVENESS")
    add(
        "--teacher",
        nargs="+",
        type=_options,
        metavar="WORDS",
        default=[],
        help="such as FOLD_NORMS+bfloat16",
    )
    add("--json", metavar="FILE", help="write all numbers here")
    add_overrides(parser)
    return parse_command_line(parser, argv)


def _size(text: str) -> Tuple[int, int]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH in pixels, as 800x1344")
    height, width = text.split("x")
    return int(height), int(width)


def _options(text: str) -> str:
    options_in(text)  # argparse tells what is none
    return text


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    # Before anything is built here: a child's peak would start from what this process holds.
    memory = memory_of(args) if args.memory else {}
    measured = run(args)
    report = {
        "pair": args.config_file or args.pair,
        "size": "{}x{}".format(*args.size),
        **{k: getattr(args, k) for k in ("images", "boxes", "rounds")},
        "clock": "CPU" if args.cpu_seconds else "wall",
        "hardware": hardware(measured.cfg),
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
        "seconds": measured.seconds,
        "peak_mib": memory,
        "ratios": ratios_of(measured),
        "heads": heads_of(measured),
    }
    print_report(report)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    sys.exit(run_command("benchmark.py", main))
