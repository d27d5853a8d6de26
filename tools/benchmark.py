#!/usr/bin/env python
"""Measure what distillation costs: seconds and memory of a training step, part by part."""

import argparse
import copy
import dataclasses
import gc
import itertools
import json
import os
import platform
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from multiprocessing import get_context
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Callable, ContextManager, Dict, List, Sequence, Tuple

import torch
from tabulate import tabulate
from torch import Tensor, nn

import detectron2
from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from d2kd import DetectorView, Distiller, load_config
from d2kd.engine.finite import FiniteAMPTrainer, FiniteSimpleTrainer
from d2kd.engine.optimizer import build_optimizer
from d2kd.engine.preflight import check_config
from d2kd.heads.build import head_class, required_members
from d2kd.views import find_view

Step = Callable[[], None]
Batch = List[Dict[str, Any]]
Seconds = Dict[str, List[float]]

GUIDE = """
Every round runs each arm once, on the same batch, odd rounds in reverse order:
  student     forward, backward and optimizer step of the plain student          (a)
  teacher     the part the head reads, without gradients: the pyramid's
              features; "with dense": and the predictions at every cell          (b)
  head NAME   forward, backward and optimizer step of the head alone, on
              recorded features                                                  (h)
  with NAME   the whole distillation step, as training runs it                   (c)
A ratio is the median over rounds of the ratio within a round, then [min, max]. c/(a+b+h) - 1 is
what d2kd itself costs, c/(a+b) - 1 what d2kd and the method cost. RoI features and predictions that
a head asks of a teacher count as the head's. --memory measures in processes of their own: the plain
student without a teacher, and each distillation step.

Weights are random and the learning rate is 0: the time depends on neither, and no file of weights
is needed or read. On a machine that others use, take --threads 1 --cpu-seconds.

examples:
  python tools/benchmark.py --pair faster_rcnn_R_101-R_18 --heads MGD PKD
  python tools/benchmark.py --size 800x1344 --images 8 --amp --memory
  python tools/benchmark.py --config-file configs/quickstart/pkd.yaml --json cost.json
  python tools/benchmark.py --heads MGD --opts DISTILL.MGD.MASK_RATIO 0.45
"""

_THIRDS = [2 ** (i / 3) for i in range(3)]
_RETINANET = {
    "MODEL.META_ARCHITECTURE": "RetinaNet",
    "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[x * k for k in _THIRDS] for x in (32, 64, 128, 256, 512)],
}
_FASTER_RCNN = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 2000,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1000,
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
}
# Name to what both detectors have, then to what the student has of its own: the model zoo's sizes.
PAIRS = {
    "retinanet_R_101-R_50": (_RETINANET, {"MODEL.RESNETS.DEPTH": 50}),
    "faster_rcnn_R_101-R_18": (
        _FASTER_RCNN,
        {"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64},
    ),
}


# What is measured ---------------------------------------------------------------------------------


def build_config(args: argparse.Namespace, folder: str) -> CfgNode:
    """The distillation config of --config-file or --pair; a pair's teacher is written to folder."""
    device = [] if args.device == "auto" else ["MODEL.DEVICE", args.device]
    if args.config_file:
        cfg = load_config(args.config_file, [*device, *args.opts])
    else:
        shared, student = PAIRS[args.pair]
        teacher = os.path.join(folder, "teacher.yaml")
        with open(teacher, "w") as file:
            file.write(load_config("", _words({**shared, "MODEL.RESNETS.DEPTH": 101})).dump())
        distill = {
            "MODEL.META_ARCHITECTURE": "Distiller",
            "DISTILL.STUDENT_META_ARCHITECTURE": shared["MODEL.META_ARCHITECTURE"],
            "DISTILL.TEACHER.CONFIG_FILE": teacher,
            "DISTILL.HEADS": ["MGD", "PKD"],
        }
        cfg = load_config("", _words({**shared, **student, **distill}) + device + args.opts)
    cfg.DISTILL.HEADS = args.heads or cfg.DISTILL.HEADS
    cfg.DISTILL.TEACHER.ALLOW_RANDOM_WEIGHTS, cfg.DISTILL.TEACHER.WEIGHTS = True, ""
    cfg.SOLVER.BASE_LR, cfg.SOLVER.AMP.ENABLED = 0.0, args.amp
    check_config(cfg)
    return cfg


def _words(values: Dict[str, Any]) -> List[Any]:
    return [word for pair in values.items() for word in pair]


def build_arms(cfg: CfgNode, args: argparse.Namespace) -> Dict[str, Callable[[], Step]]:
    """Name of each arm to what builds its step; all share one student and one teacher."""
    torch.manual_seed(0)
    whole = build_model(cfg).train()
    calm(whole)
    batch = random_batch(whole.student, args)
    stock, ours = (
        (AMPTrainer, FiniteAMPTrainer) if args.amp else (SimpleTrainer, FiniteSimpleTrainer)
    )
    arms = {"student": partial(training_step, cfg, whole.student, batch, stock)}
    for name in whole.heads:
        distiller = with_one_head(whole, name)
        arms.setdefault(teacher_arm(distiller), partial(teacher_step, cfg, distiller, batch))
        arms[f"head {name}"] = partial(head_step, cfg, distiller, batch)
        arms[f"with {name}"] = partial(training_step, cfg, distiller, batch, ours)
    return arms


def calm(distiller: Distiller) -> None:
    """Shrink the residual branches: as initialised, with frozen norms, deep ResNets overflow."""
    detectors = [distiller.student] + [x.model for x in [distiller.teacher] if x is not None]
    for block in itertools.chain(*(x.modules() for x in detectors)):
        if isinstance(block, (BasicBlock, BottleneckBlock)):
            last = block.conv3 if isinstance(block, BottleneckBlock) else block.conv2
            if getattr(last.norm, "weight", None) is not None:
                last.norm.weight.data.mul_(0.1)


def random_batch(student: nn.Module, args: argparse.Namespace) -> Batch:
    """Images of noise with random boxes, on the host, as a data loader gives them."""
    num_classes, batch = find_view(student, "student").num_classes(student), []
    (height, width), n = args.size, args.boxes
    for _ in range(args.images):
        corner = torch.rand(n, 2) * torch.tensor([width, height]) / 2
        boxes = torch.cat([corner, corner + (0.1 + torch.rand(n, 2) * 0.4) * min(height, width)], 1)
        outlines = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()
        instances = Instances((height, width), gt_boxes=Boxes(boxes))
        instances.gt_masks = PolygonMasks([[x] for x in outlines])  # read by Mask R-CNN alone
        instances.gt_classes = torch.randint(num_classes, (n,))
        image = torch.randint(256, (3, height, width), dtype=torch.uint8)
        batch.append({"image": image, "instances": instances})
    return batch


def with_one_head(whole: Distiller, name: str) -> Distiller:
    """A Distiller of the same student and teacher, with a single head."""
    return Distiller(
        student=whole.student,
        teacher=whole.teacher,
        heads={name: whole.heads[name]},
        schedules=whole.schedules,
        image_format=whole.image_format,
        inherit_parts=[],
        members=required_members(type(whole.heads[name])),
    )


def training_step(cfg: CfgNode, model: nn.Module, batch: Batch, trainer: type) -> Step:
    """Forward, backward, losses read to the host, optimizer step: what a trainer of cfg runs."""
    return trainer(model, itertools.repeat(batch), build_optimizer(cfg, model)).run_step


def teacher_arm(distiller: Distiller) -> str:
    return "teacher with dense" if "dense" in distiller.members else "teacher"


def teacher_step(cfg: CfgNode, distiller: Distiller, batch: Batch) -> Step:
    """The parts of a teacher's view that are computed once per batch."""
    teacher = distiller.teacher
    view_class = find_view(teacher.model, "teacher")

    def step() -> None:
        with autocast(cfg):
            view = view_class(teacher.model, teacher.batch(batch, distiller.image_format))
            view.features
            if "dense" in distiller.members:
                view.dense()

    return step


def head_step(cfg: CfgNode, distiller: Distiller, batch: Batch) -> Step:
    """The head on leaves that stand for what the two detectors gave it."""
    (head,) = distiller.heads.values()
    with autocast(cfg):
        distiller(batch)
    student, teacher = (detached(distiller.latest[k]) for k in ("student", "teacher"))
    distiller.latest = {}
    has_parameters = any(p.requires_grad for p in head.parameters())
    optimizer = build_optimizer(cfg, head) if has_parameters else None

    def step() -> None:
        with autocast(cfg):
            # Fresh leaves: nothing to add to, as in the student's own backward.
            terms = head(detached(student), teacher)
            total = sum(sum(v.values()) if isinstance(v, dict) else v for v in terms.values())
        if optimizer:
            optimizer.zero_grad()
        total.backward()
        if optimizer:
            optimizer.step()

    return step


def autocast(cfg: CfgNode) -> ContextManager:
    return torch.autocast("cuda") if cfg.SOLVER.AMP.ENABLED else nullcontext()


def detached(view: DetectorView) -> DetectorView:
    """The same view, cut off its detector's graph: every recorded tensor is a leaf."""
    view = copy.copy(view)
    view._recorded, view._versions = _leaves(view._recorded), {}
    return view


def _leaves(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.detach().requires_grad_(x.requires_grad)
    if isinstance(x, dict):
        return {k: _leaves(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return type(x)(_leaves(v) for v in x)
    if dataclasses.is_dataclass(x):
        return type(x)(**{k: _leaves(v) for k, v in vars(x).items()})
    return x


# Measuring and reporting --------------------------------------------------------------------------


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


def run(args: argparse.Namespace, arm: str = "") -> Tuple[CfgNode, Seconds, float]:
    """
    Build and measure all arms, or a single one and its memory: then in a process of its own.

    Returns:
        the config; seconds of every arm; peak MiB of this process: of the GPU, or resident on a CPU
    """
    torch.set_num_threads(args.threads)
    with TemporaryDirectory() as folder, EventStorage():
        cfg = build_config(args, folder)
        cfg.DISTILL.ENABLED = arm != "student"
        if arm.startswith("with "):
            cfg.DISTILL.HEADS = [arm[len("with ") :]]
        arms = build_arms(cfg, args)
        steps = {name: build() for name, build in arms.items() if arm in ("", name)}
        seconds = measure(steps, args)
    return cfg, seconds, _peak_mib()


def _peak_mib() -> float:
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def memory_of(args: argparse.Namespace) -> Dict[str, float]:
    """Peak MiB of the plain student and of each distillation step, each in a fresh process."""
    with TemporaryDirectory() as folder:
        heads = build_config(args, folder).DISTILL.HEADS
    short = argparse.Namespace(**{**vars(args), "warmup": 1, "rounds": 3})
    memory = {}
    for arm in ["student"] + [f"with {name}" for name in heads]:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            memory[arm] = pool.submit(run, short, arm).result()[-1]
    return memory


def summarise(cfg: CfgNode, seconds: Seconds) -> Dict[str, Dict[str, List[float]]]:
    """Head to its ratios, each [median, min, max] over rounds."""
    summary = {}
    for name in cfg.DISTILL.HEADS:
        dense = "dense" in required_members(head_class(name))
        teacher = seconds["teacher with dense" if dense else "teacher"]
        rounds = list(
            zip(seconds["student"], teacher, seconds[f"head {name}"], seconds[f"with {name}"])
        )
        ratios = {
            "c/(a+b+h)": [c / (a + b + h) for a, b, h, c in rounds],
            "c/(a+b)": [c / (a + b) for a, b, h, c in rounds],
            "teacher share": [b / c for a, b, h, c in rounds],
        }
        summary[name] = {k: [median(v), min(v), max(v)] for k, v in ratios.items()}
    return summary


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
    ratios = [
        (name, *("{:.3f} [{:.3f}, {:.3f}]".format(*x) for x in summary.values()))
        for name, summary in report["ratios"].items()
    ]
    print(tabulate(ratios, ["head", *next(iter(report["ratios"].values()))]))


def parse_args(argv: Sequence[str] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=GUIDE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--pair", choices=sorted(PAIRS), default="retinanet_R_101-R_50", help="teacher-student")
    add("--config-file", help="any distillation YAML, in place of --pair")
    add("--heads", nargs="+", metavar="NAME", help="default: those of the YAML; MGD PKD for a pair")
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
    add("--json", metavar="FILE", help="write all numbers here")
    add(
        "--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE", help="config overrides"
    )
    return parser.parse_args(argv)


def _size(text: str) -> Tuple[int, int]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not HEIGHTxWIDTH in pixels, as 800x1344")
    height, width = text.split("x")
    return int(height), int(width)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def main(argv: Sequence[str] = None) -> None:
    args = parse_args(argv)
    # Before anything is built here: a child's peak would start from what this process holds.
    memory = memory_of(args) if args.memory else {}
    cfg, seconds, _ = run(args)
    report = {
        "pair": args.config_file or args.pair,
        "size": "{}x{}".format(*args.size),
        **{k: getattr(args, k) for k in ("images", "boxes", "rounds")},
        "clock": "CPU" if args.cpu_seconds else "wall",
        "hardware": hardware(cfg),
        "torch": torch.__version__,
        "detectron2": detectron2.__version__,
        "seconds": seconds,
        "peak_mib": memory,
        "ratios": summarise(cfg, seconds),
    }
    print_report(report)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=2)


if __name__ == "__main__":
    main()
