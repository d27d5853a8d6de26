"""What tools/benchmark.py measures: the two detectors, and the steps of each arm."""

import argparse
import copy
import itertools
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import (
    Any,
    Callable,
    ContextManager,
    Dict,
    FrozenSet,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
)

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detectron2.config import CfgNode
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock

from d2kd import DetectorView, Distiller, load_config, student_config
from d2kd.data.noise import noise_batch
from d2kd.engine.monitor.finite import FiniteAMPTrainer, FiniteSimpleTrainer
from d2kd.engine.monitor.loss_gradients import LossGradients
from d2kd.engine.optimizer import build_optimizer
from d2kd.engine.preflight.check_config import check_config
from d2kd.heads.fit import requires_of
from d2kd.lesson import Lesson
from d2kd.teacher import Teacher, TeacherOptions
from d2kd.teacher.options import PRECISIONS
from d2kd.teacher.speed_up import with_options
from d2kd.views import (
    DensePredictions,
    Regions,
    RoIPredictions,
    Towers,
    describe_detector,
    find_view,
)
from d2kd.views.map_tensors import map_tensors

Step = Callable[[], None]
Batch = List[Dict[str, Any]]

COCO = Path(__file__).resolve().parents[1] / "configs" / "COCO"
_R_18 = {"MODEL.RESNETS.DEPTH": 18, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64}
# Name to the YAML of which the teacher is the detector, with a ResNet-101; the student's YAML; and
# what the student has of its own.
PAIRS = {
    "retinanet_R_101-R_50": ("Base-RetinaNet.yaml", "Base-RetinaNet.yaml", {}),
    "faster_rcnn_R_101-R_18": ("Base-FasterRCNN.yaml", "Base-FasterRCNN.yaml", _R_18),
    "faster_rcnn_R_101-retinanet_R_50": ("Base-FasterRCNN.yaml", "Base-RetinaNet.yaml", {}),
    "retinanet_R_101-faster_rcnn_R_18": ("Base-RetinaNet.yaml", "Base-FasterRCNN.yaml", _R_18),
}


# Both detectors -----------------------------------------------------------------------------------


def build_config(args: argparse.Namespace, folder: str) -> CfgNode:
    """The distillation config of --config-file or --pair; a pair's teacher is written to folder."""
    device = [] if args.device == "auto" else ["MODEL.DEVICE", args.device]
    if args.config_file:
        cfg = load_config(args.config_file, [*device, *args.opts])
        if cfg.MODEL.META_ARCHITECTURE != "Distiller":
            raise ValueError(
                f"--config-file: {args.config_file} trains a student alone. Name the YAML of a "
                "distillation."
            )
        if cfg.DISTILL.TEACHERS:
            raise ValueError(
                f"--config-file {args.config_file} has several teachers (DISTILL.TEACHERS); the "
                "benchmark is of one. doctor tells what each costs."
            )
    else:
        teacher, student, overrides = PAIRS[args.pair]
        distill = {
            "DISTILL.TEACHER.CONFIG_FILE": write_teacher(teacher, folder),
            "DISTILL.HEADS": ["MGD", "PKD"],
        }
        words = [word for pair in {**overrides, **distill}.items() for word in pair]
        cfg = load_config(str(COCO / student), [*words, *device, *args.opts])
    cfg.DISTILL.HEADS = heads_in(args.heads or cfg.DISTILL.HEADS)
    cfg.DISTILL.TEACHER.ALLOW_RANDOM_WEIGHTS, cfg.DISTILL.TEACHER.WEIGHTS = True, ""
    cfg.SOLVER.BASE_LR, cfg.SOLVER.AMP.ENABLED = 0.0, args.amp
    check_config(cfg)
    return cfg


def heads_in(combinations: Sequence[str]) -> List[str]:
    """["FGD", "FGD+DKD"] -> ["FGD", "DKD"]"""
    return list(dict.fromkeys(name for x in combinations for name in x.split("+")))


def write_teacher(name: str, folder: str) -> str:
    """Path of a YAML of the student that configs/COCO/`name` trains, with a ResNet-101."""
    cfg = load_config(str(COCO / name), ["MODEL.RESNETS.DEPTH", 101, "MODEL.WEIGHTS", ""])
    path = os.path.join(folder, "teacher.yaml")
    with open(path, "w") as file:
        file.write(student_config(cfg).dump())
    return path


def calm(distiller: Distiller) -> None:
    """Shrink the residual branches: as initialised, with frozen norms, deep ResNets overflow."""
    detectors = [distiller.student] + [x.model for x in [distiller.teacher] if x is not None]
    for block in itertools.chain(*(x.modules() for x in detectors)):
        if isinstance(block, (BasicBlock, BottleneckBlock)):
            last = block.conv3 if isinstance(block, BottleneckBlock) else block.conv2
            if getattr(last.norm, "weight", None) is not None:
                last.norm.weight.data.mul_(0.1)


def random_batch(student: nn.Module, args: argparse.Namespace) -> Batch:
    num_classes = describe_detector(student, "student").num_classes
    return noise_batch(args.images, *args.size, args.boxes, num_classes)


# The arms -----------------------------------------------------------------------------------------


def build_arms(cfg: CfgNode, args: argparse.Namespace) -> Dict[str, Callable[[], Step]]:
    """Name of each arm to what builds its step; all share one student and one teacher."""
    torch.manual_seed(0)
    whole = build_model(cfg).train()
    calm(whole)
    for head in whole.heads.values():
        fill_queue(head)
    batch = random_batch(whole.student, args)
    stock, ours = (
        (AMPTrainer, FiniteAMPTrainer) if args.amp else (SimpleTrainer, FiniteSimpleTrainer)
    )
    arms = {"student": partial(training_step, cfg, whole.student, batch, stock)}
    plain = whole.teacher
    others = {x: with_options(plain, options_in(x)) for x in args.teacher if whole.heads}
    for name in (args.heads or cfg.DISTILL.HEADS) if whole.heads else []:
        distiller = with_heads(cfg, whole, name.split("+"))
        arms.setdefault(teacher_arm(distiller), partial(teacher_step, cfg, distiller, batch))
        arms[f"head {name}"] = partial(HeadAlone, cfg, distiller, batch)
        arms[f"with {name}"] = partial(training_step, cfg, distiller, batch, ours)
        if args.look:
            watched = with_heads(cfg, whole, name.split("+"))
            watched.register_forward_hook(look)
            arms[f"look {name}"] = partial(training_step, cfg, watched, batch, ours)
        for options, teacher in others.items():
            other = with_heads(cfg, whole, name.split("+"), teacher)
            alone = teacher_arm(other)
            arms.setdefault(f"{alone}, {options}", partial(teacher_step, cfg, other, batch))
            arms[f"with {name}, {options}"] = partial(training_step, cfg, other, batch, ours)
    return arms


def options_in(text: str) -> TeacherOptions:
    """FOLD_NORMS+bfloat16 -> TeacherOptions(fold_norms=True, precision="bfloat16")"""
    words = text.split("+")
    precision = {"precision": x for x in words if x in PRECISIONS}
    return TeacherOptions(**precision, **{x.lower(): True for x in words if x not in PRECISIONS})


def fill_queue(head: nn.Module) -> None:
    """
    Fill a head's queue of past keys with random ones of length 1.

    What a head with a queue costs grows with the keys in it. In a run it is full but for the first
    iterations; here it would fill from round to round, each arm finding more than the one before.
    """
    if hasattr(head, "queue_size"):
        head.queue = F.normalize(
            head.queue.new_empty(head.queue_size, head.queue.shape[1]).normal_()
        )


def with_heads(
    cfg: CfgNode, whole: Distiller, names: Sequence[str], teacher: Optional[Teacher] = None
) -> Distiller:
    """A Distiller of the same student, and teacher unless another is given, with some heads."""
    lesson = Lesson(teacher or whole.teacher, names, required_by(cfg, whole, names))
    return Distiller(
        student=whole.student,
        lessons=[lesson],
        heads={name: whole.heads[name] for name in names},
        schedules=whole.schedules,
        image_format=whole.image_format,
    )


def required_by(cfg: CfgNode, whole: Distiller, names: Sequence[str]) -> FrozenSet[str]:
    """What these heads require of both views; `whole.requires` is what all of them do."""
    required = [requires_of(type(whole.heads[name]), cfg, whole.pair) for name in names]
    return frozenset().union(*required)


def training_step(cfg: CfgNode, model: nn.Module, batch: Batch, trainer: type) -> Step:
    """Forward, backward, losses read to the host, optimizer step: what a trainer of cfg runs."""
    return trainer(model, itertools.repeat(batch), build_optimizer(cfg, model)).run_step


def look(distiller: Distiller, inputs: Any, losses: Dict[str, Tensor]) -> None:
    """What DISTILL.LIVENESS does in a watched step."""
    LossGradients.measure(losses, distiller.last_step)


def teacher_arm(distiller: Distiller) -> str:
    # Of the predictions at every cell, heads read different ones.
    return f"teacher of {'+'.join(distiller.heads)}" if reads_dense(distiller) else "teacher"


def reads_dense(distiller: Distiller) -> bool:
    """Whether a head reads the teacher's dense predictions, or region vectors cut out of them."""
    teacher = find_view(distiller.teacher.model, "teacher")
    parts = {"dense"} if teacher.two_stage else {"dense", "region_vectors"}
    return bool(parts & distiller.requires)


def teacher_step(cfg: CfgNode, distiller: Distiller, batch: Batch) -> Step:
    """The parts of a teacher's view that are computed once per batch, where the heads read them."""
    lists: Sequence[str] = ()
    if reads_dense(distiller):
        with autocast(cfg), torch.no_grad():
            distiller(batch)
        lists = distiller.last_step.teacher.dense().computed

    def step() -> None:
        with autocast(cfg):
            view = distiller.view_of_teacher(batch)
            for level in distiller.read_levels(distiller.lessons[0].heads) or view.features:
                view.features[level]
            for name in lists:
                getattr(view.dense(), name)

    return step


class HeadAlone:
    """
    A distiller's heads on leaves that stand for what the two detectors gave them. Called, they do a
    step.
    """

    def __init__(self, cfg: CfgNode, distiller: Distiller, batch: Batch):
        self.heads = distiller.heads
        self.cfg = cfg
        self.teacher_arm = teacher_arm(distiller)
        with autocast(cfg):
            distiller(batch)
        self.student, self.teacher = map(
            detached, (distiller.last_step.student, distiller.last_step.teacher)
        )
        distiller.last_step = None
        has_parameters = any(p.requires_grad for p in self.heads.parameters())
        self.optimizer = build_optimizer(cfg, self.heads) if has_parameters else None

    def loss(self) -> Tensor:
        with autocast(self.cfg):
            # Fresh leaves: nothing to add to, as in the student's own backward. Fresh views: what a
            # head asks of them beside their parts, it asks in every step.
            views = detached(self.student), detached(self.teacher)
            terms = [term for head in self.heads.values() for term in head(*views).values()]
            return sum(sum(v.values()) if isinstance(v, dict) else v for v in terms)

    def __call__(self) -> None:
        total = self.loss()
        if self.optimizer:
            self.optimizer.zero_grad()
        total.backward()
        if self.optimizer:
            self.optimizer.step()

    def given(self) -> List[Tensor]:
        """Every tensor that is there before the head runs: recorded ones, parameters, buffers."""
        tensors: List[Tensor] = []
        for view in (self.student, self.teacher):
            tensors += tensors_in(view._recorded)
        for module in (self.heads, self.student.detector, self.teacher.detector):
            tensors += [*module.parameters(), *module.buffers()]
        return tensors


def tensors_in(part: Any) -> Iterator[Tensor]:
    """Of what a view has recorded; what was put off is computed."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, DensePredictions):
        yield from tensors_in([part.logits, part.deltas, part.tower, part.centerness])
    elif isinstance(part, Mapping):
        yield from tensors_in(list(part.values()))
    elif isinstance(part, (list, tuple)):
        yield from itertools.chain(*map(tensors_in, part))
    elif isinstance(part, (RoIPredictions, Towers)):
        yield from tensors_in(list(vars(part).values()))


def autocast(cfg: CfgNode) -> ContextManager:
    return torch.autocast("cuda") if cfg.SOLVER.AMP.ENABLED else nullcontext()


def detached(view: DetectorView) -> DetectorView:
    """
    The same view, cut off its detector's graph: every recorded tensor is a leaf.

    It has forgotten its answers: RoI features and predictions of given boxes, a dense student's
    regions.
    """

    def leaf(x: Tensor) -> Tensor:
        return x.detach().requires_grad_(x.requires_grad)

    view = copy.copy(view)
    view._recorded, view._versions = map_tensors(leaf, view._recorded), {}
    view._answers = {}
    if "regions" in view._recorded:
        # Anew, but of the very same list of boxes, by which a view finds their RoI features.
        regions = view._recorded["regions"]
        view._recorded["regions"] = Regions(regions.boxes, regions.source)
    return view
