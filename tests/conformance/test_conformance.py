"""All heads pass the conformance kit, and the kit catches heads with defects."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, Type

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable

from d2kd import DISTILL_HEAD_REGISTRY
from d2kd.conformance import conformance
from d2kd.conformance.__main__ import main
from d2kd.conformance.case import PAIRS, Case, Pair, check_refusal, find_case
from d2kd.conformance.gradients import (
    check_gradients,
    check_other_channels,
    check_without_boxes,
)
from d2kd.conformance.half_precision import check_mixed_precision, runs_in_float16
from d2kd.conformance.numerics import check_extreme_logits, check_image_sizes
from d2kd.conformance.requires import RequiredView
from d2kd.conformance.saving import check_checkpoint
from d2kd.conformance.terms import (
    check_batch_size,
    check_names,
    check_weight,
    check_zero_at_equal,
)
from d2kd.conformance.two_processes import check_processes
from d2kd.heads import DistillPair
from d2kd.heads.registry import head_names
from d2kd.utils.user_mistakes import run_command
from d2kd.views import DetectorView
from tests.helpers.forks import python
from tests.helpers.toys import ROOT

TestHeads = conformance(*head_names())

RETINANET = PAIRS[0]


class SoundHead(nn.Module):
    """The squared error on P3 behind an adapter; each of the others below has one defect."""

    requires = frozenset({"features", "dense"})

    @configurable
    def __init__(self, *, loss_weight: float):
        super().__init__()
        self.loss_weight = loss_weight
        self.adapter = nn.Conv2d(32, 32, 1)

    @staticmethod
    def add_config(node: CfgNode) -> None:
        node.LOSS_WEIGHT = 2.0

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair) -> Dict[str, Any]:
        return {"loss_weight": cfg.DISTILL.Defective.LOSS_WEIGHT}

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Tensor]:
        return {"loss_defective": self.error(student, teacher)}

    def error(self, student: DetectorView, teacher: DetectorView) -> Tensor:
        x = self.adapter(student.features["p3"]).float()
        return (x - teacher.features["p3"].float()).square().mean()


class Misnamed(SoundHead):
    def forward(self, student, teacher):
        return {"distance": self.error(student, teacher)}


class Unreduced(SoundHead):
    def forward(self, student, teacher):
        return {"loss_defective": self.adapter(student.features["p3"]).square()}


class ReturnsATensor(SoundHead):
    def forward(self, student, teacher):
        return self.error(student, teacher)


class ReturnsHalfPrecision(SoundHead):
    def forward(self, student, teacher):
        return {"loss_defective": self.error(student, teacher).half()}


class TakesLogOfZero(SoundHead):
    def forward(self, student, teacher):
        zero = student.features["p3"].sum() * 0
        return {"loss_defective": self.error(student, teacher) - zero.log()}


class TakenName(SoundHead):
    def forward(self, student, teacher):
        return {"loss_cls": self.error(student, teacher)}


class DetachesTheStudent(SoundHead):
    def forward(self, student, teacher):
        x = self.adapter(student.features["p3"].detach())
        return {"loss_defective": (x - teacher.features["p3"]).square().mean()}


class DetachesALevel(SoundHead):
    def forward(self, student, teacher):
        x = self.adapter(student.features["p4"].detach()).float()
        coarse = (x - teacher.features["p4"].float()).square().mean()
        return {"loss_defective": {"p3": self.error(student, teacher), "p4": coarse}}


class SeesTheFirstImage(SoundHead):
    def error(self, student, teacher):
        x = self.adapter(student.features["p3"]).float()
        return (x[0] - teacher.features["p3"][0].float()).square().mean()


class SumsOverImages(SoundHead):
    def forward(self, student, teacher):
        return {"loss_defective": len(student.image_sizes) * self.error(student, teacher)}


class DrawsChannels(SoundHead):
    def forward(self, student, teacher):
        self.maps = {"error": {"p3": student.features["p3"].detach()}}
        return super().forward(student, teacher)


class KeepsTheGraph(SoundHead):
    def forward(self, student, teacher):
        self.maps = {"mean": {"p3": student.features["p3"].mean(dim=1, keepdim=True)}}
        return super().forward(student, teacher)


class WeighsItself(SoundHead):
    def forward(self, student, teacher):
        return {"loss_defective": self.loss_weight * self.error(student, teacher)}


class IsNeverTheSame(SoundHead):
    calls = itertools.count(1)

    def forward(self, student, teacher):
        return {"loss_defective": next(self.calls) * self.error(student, teacher)}


class TrainsTheTeacher(SoundHead):
    def forward(self, student, teacher):
        head = teacher.detector.head.requires_grad_(True)
        logits = torch.cat([x.flatten() for x in head(list(student.features.values()))[0]])
        return {"loss_defective": self.error(student, teacher) + logits.square().mean()}


class MovesTheTeacher(SoundHead):
    def forward(self, student, teacher):
        detector = teacher.detector.train()
        detector.backbone(detector.preprocess_image(teacher.batched_inputs).tensor)
        detector.eval()
        return super().forward(student, teacher)


class UnfreezesTheTeacher(SoundHead):
    def forward(self, student, teacher):
        teacher.detector.backbone.requires_grad_(True)
        return super().forward(student, teacher)


class LeavesTheTeacherInTrainMode(SoundHead):
    def forward(self, student, teacher):
        teacher.detector.head.train()
        return super().forward(student, teacher)


class TakesRootOfZero(SoundHead):
    def forward(self, student, teacher):
        x = student.features["p3"]
        root = (x - x.detach()).square().sum().sqrt()  # 0, and its gradient 0 / 0
        return {"loss_defective": self.error(student, teacher) + root}


class HasAnUnusedParameter(SoundHead):
    def __init__(self, cfg, pair):
        super().__init__(cfg, pair)
        self.forgotten = nn.Linear(2, 2)


class ReadsWhatItDoesNotRequire(SoundHead):
    requires = frozenset({"features"})

    def forward(self, student, teacher):
        return {"loss_defective": self.error(student, teacher) + student.dense().logits[0].mean()}


class ReadsLabelsOfTheBatch(SoundHead):
    def forward(self, student, teacher):
        boxes = sum(len(x["instances"]) for x in student.batched_inputs)
        return {"loss_defective": self.error(student, teacher) * boxes}


class CentresTheTeacher(SoundHead):
    def forward(self, student, teacher):
        losses = super().forward(student, teacher)
        target = teacher.features["p3"].float()
        target -= target.mean()
        return losses


class CentresTheTower(SoundHead):
    def forward(self, student, teacher):
        tower = teacher.dense().tower[0]
        tower -= tower.mean()
        return super().forward(student, teacher)


class CentresRegions(SoundHead):
    requires = frozenset({"features", "gt_instances", "roi_features"})

    def forward(self, student, teacher):
        found = teacher.roi_features([x.gt_boxes for x in student.gt_instances])
        found -= found.mean()
        return super().forward(student, teacher)


class ScalesTheBoxes(SoundHead):
    requires = frozenset({"features", "gt_instances"})

    def forward(self, student, teacher):
        for instances in student.gt_instances:
            instances.gt_boxes.scale(1 / 8, 1 / 8)
        return super().forward(student, teacher)


class TakesLogOfSoftmax(SoundHead):
    def forward(self, student, teacher):
        x, target = (view.dense().logits[0].flatten(1).softmax(1) for view in (student, teacher))
        divergence = (target * (target.log() - x.log())).sum()
        return {"loss_defective": self.error(student, teacher) + divergence}


class NeedsBoxes(SoundHead):
    def forward(self, student, teacher):
        boxes = sum(len(x) for x in student.gt_instances)
        zero = student.features["p3"].sum() * 0
        return {"loss_defective": self.error(student, teacher) if boxes else zero}


class DividesByBoxes(SoundHead):
    def forward(self, student, teacher):
        boxes = sum(len(x) for x in student.gt_instances)
        return {"loss_defective": self.error(student, teacher) / torch.tensor(float(boxes))}


class ReturnsNothingWithoutBoxes(SoundHead):
    def forward(self, student, teacher):
        boxes = sum(len(x) for x in student.gt_instances)
        return super().forward(student, teacher) if boxes else {}


class ReturnsANumberWithoutBoxes(SoundHead):
    def forward(self, student, teacher):
        boxes = sum(len(x) for x in student.gt_instances)
        return super().forward(student, teacher) if boxes else {"loss_defective": 0.0}


class CallsItOtherwiseWithoutBoxes(SoundHead):
    def forward(self, student, teacher):
        boxes = sum(len(x) for x in student.gt_instances)
        name = "loss_objects" if boxes else "loss_background"
        return {name: self.error(student, teacher)}


class DividesByUnlikeSizes(SoundHead):
    def forward(self, student, teacher):
        alike = torch.tensor(float(len(set(student.image_sizes)) == 1))
        return {"loss_defective": self.error(student, teacher) / alike}


class SkipsUnlikeSizes(SoundHead):
    def forward(self, student, teacher):
        alike = len(set(student.image_sizes)) == 1
        zero = student.features["p3"].sum() * 0
        return {"loss_defective": self.error(student, teacher) if alike else zero}


class WritesIntoTheStudent(SoundHead):
    def forward(self, student, teacher):
        student.detector.register_buffer("steps", torch.zeros(()))
        return super().forward(student, teacher)


class KeepsTheTeacher(SoundHead):
    def forward(self, student, teacher):
        self.teacher = teacher.detector
        return super().forward(student, teacher)


class HasAQueueThatGrows(SoundHead):
    def __init__(self, cfg, pair):
        super().__init__(cfg, pair)
        self.register_buffer("queue", torch.zeros(0))

    def forward(self, student, teacher):
        loss = self.error(student, teacher)
        self.queue = torch.cat([self.queue, loss.detach()[None]])
        return {"loss_defective": loss}


class ForgetsItsMemory(SoundHead):
    def __init__(self, cfg, pair):
        super().__init__(cfg, pair)
        self.register_buffer("steps", torch.zeros(()), persistent=False)

    def forward(self, student, teacher):
        self.steps += 1
        return {"loss_defective": self.error(student, teacher) * self.steps}


class HidesItsQueue(SoundHead):
    def __init__(self, cfg, pair):
        super().__init__(cfg, pair)
        self.queue = torch.zeros(100, 32)

    def forward(self, student, teacher):
        keys = teacher.features["p3"].mean(dim=(2, 3))
        self.queue = torch.cat([self.queue[len(keys) :], keys])
        is_full = bool(self.queue[0].any())
        return {"loss_defective": self.error(student, teacher) * (1 + is_full * keys.mean())}


class ForgetsWhereItWrites(SoundHead):
    def __init__(self, cfg, pair):
        super().__init__(cfg, pair)
        self.register_buffer("queue", torch.zeros(100, 32))
        self.oldest = 0

    def forward(self, student, teacher):
        loss = self.error(student, teacher) + self.queue.mean()
        self.queue[self.oldest] = teacher.features["p3"].mean(dim=(0, 2, 3))
        self.oldest += 1
        return {"loss_defective": loss}


class DrawsFromItsOwn(SoundHead):
    def __init__(self, cfg, pair):
        super().__init__(cfg, pair)
        self.generator = np.random.default_rng(0)

    def forward(self, student, teacher):
        return {"loss_defective": self.error(student, teacher) * self.generator.uniform(0.5, 1)}


class HasAMeanOfItsOwn(SoundHead):
    def __init__(self, cfg, pair):
        super().__init__(cfg, pair)
        self.register_buffer("mean", torch.zeros(32))

    def forward(self, student, teacher):
        self.mean = 0.9 * self.mean + 0.1 * teacher.features["p3"].mean(dim=(0, 2, 3))
        return {"loss_defective": self.error(student, teacher) + self.mean.mean()}


class HasAListOfModules(SoundHead):
    def __init__(self, cfg, pair):
        super().__init__(cfg, pair)
        self.more = [nn.Conv2d(32, 32, 1)]

    def forward(self, student, teacher):
        x = self.more[0](student.features["p3"]).float()
        return {"loss_defective": self.error(student, teacher) + x.square().mean()}


class MultipliesInHalfPrecision(SoundHead):
    def forward(self, student, teacher):
        x = student.features["p3"].float().flatten(1)
        return {"loss_defective": (x @ x.T).mean()}


class CancelsInHalfPrecision(SoundHead):
    def forward(self, student, teacher):
        x = self.adapter(student.features["p3"]) + 1000
        return {"loss_defective": (x - 1000).float().square().mean()}


class SquaresInHalfPrecision(SoundHead):
    def error(self, student, teacher):
        difference = self.adapter(student.features["p3"]) - teacher.features["p3"]
        return (difference * difference).mean().float()


class OverflowsInTheBackward(SoundHead):
    def forward(self, student, teacher):
        total = self.adapter(student.features["p3"] * 1e4).float().square().sum()
        return {"loss_defective": total * 1e-6}


class PromisesZero(SoundHead):
    zero_at_equal = True


class RefusesCurtly(SoundHead):
    @classmethod
    def from_config(cls, cfg, pair):
        raise ValueError("does not fit")


DEFECTS = [
    (Misnamed, check_names, "key 'distance'.* must start with \"loss_\""),
    (Unreduced, check_names, r"loss_defective is \(2, 32, 8, 8\); reduce it"),
    (ReturnsATensor, check_names, "forward returns Tensor .*; it must return a dict"),
    (ReturnsHalfPrecision, check_names, "loss_defective is torch.float16, in which sums overflow"),
    (TakesLogOfZero, check_names, "loss_defective is inf on noise images"),
    (TakenName, check_names, "the student has its own loss 'loss_cls'|a name that is taken"),
    (DetachesALevel, check_names, r"loss_defective\['p4'\] is not connected to the student"),
    (
        DrawsChannels,
        check_names,
        r"maps\['error'\]\['p3'\] is \(2, 32, 8, 8\); it must be \(2, 1, H, W\)",
    ),
    (KeepsTheGraph, check_names, r"maps\['mean'\]\['p3'\] is not detached"),
    (ReadsLabelsOfTheBatch, check_names, "reads the labels in batched_inputs.*add 'gt_instances'"),
    (CentresTheTower, check_names, r"changes teacher.dense\(\).tower of p3 in place"),
    (CentresRegions, check_names, "changes teacher.roi_features in place"),
    (ReadsWhatItDoesNotRequire, check_names, r"reads `dense`, but `requires` is \['features'\]"),
    (CentresTheTeacher, check_names, r"changes teacher.features\['p3'\] in place"),
    (ScalesTheBoxes, check_names, r"changes student.gt_instances\[0\].gt_boxes in place"),
    (DetachesTheStudent, check_gradients, "all gradients of the student .* are missing or 0"),
    (SeesTheFirstImage, check_gradients, r"no gradient by the images \[1\] of a batch of 2"),
    (SumsOverImages, check_batch_size, "with each image twice .* Take the mean over images"),
    (WeighsItself, check_weight, "LOSS_WEIGHT doubled, 4 times as much"),
    (IsNeverTheSame, check_weight, "in the same step with the same seeds"),
    (TrainsTheTeacher, check_gradients, "gradient for head.* of the teacher. Detach"),
    (MovesTheTeacher, check_gradients, "changes backbone.*running_.* of the teacher.*eval mode"),
    (UnfreezesTheTeacher, check_gradients, "the head unfreezes backbone.* of the teacher"),
    (LeavesTheTeacherInTrainMode, check_gradients, "leaves the teacher's head.* in train mode"),
    (
        TakesRootOfZero,
        check_gradients,
        r"the gradient of .* entries that are not finite.*sqrt\(0\)",
    ),
    (HasAnUnusedParameter, check_gradients, "forgotten.weight, forgotten.bias of the head got no"),
    (HasAnUnusedParameter, check_processes, "finished reduction in the prior iteration"),
    (TakesLogOfSoftmax, check_extreme_logits, "loss_defective is nan when all class logits"),
    (NeedsBoxes, check_without_boxes, "adapter.weight, .* got no gradient when no image has a box"),
    (NeedsBoxes, check_processes, "process 1 has no boxes in step 2"),
    (DividesByBoxes, check_without_boxes, "loss_defective is inf when no image has a box"),
    (ReturnsNothingWithoutBoxes, check_without_boxes, "returns no loss when no image has a box"),
    (ReturnsANumberWithoutBoxes, check_without_boxes, "no image has a box: .*defective is float"),
    (CallsItOtherwiseWithoutBoxes, check_without_boxes, "loss_background when .* else loss_obj"),
    (DividesByUnlikeSizes, check_image_sizes, "loss_defective is inf for a batch of a 64 x 64 and"),
    (SkipsUnlikeSizes, check_image_sizes, "adapter.weight, .* got no gradient for a batch of a 64"),
    (WritesIntoTheStudent, check_checkpoint, "the head adds steps to the student's state_dict"),
    (KeepsTheTeacher, check_checkpoint, "belongs to the teacher, and would be saved and trained"),
    (HasAQueueThatGrows, check_checkpoint, "state_dict cannot be saved and loaded: .*queue"),
    (ForgetsItsMemory, check_checkpoint, "after a resume loss_defective is .*register_buffer"),
    (DrawsFromItsOwn, check_checkpoint, "after a resume .* Draw without a generator of its own"),
    (HidesItsQueue, check_checkpoint, "queue of the head changes in training, and is not the same"),
    (ForgetsWhereItWrites, check_checkpoint, "oldest of the head changes in training"),
    (HasAMeanOfItsOwn, check_processes, "Defective.mean in the head's state_dict is not the same"),
    (HasAListOfModules, check_checkpoint, "after a resume loss_defective is .*nn.ModuleList"),
    (MultipliesInHalfPrecision, check_mixed_precision, "float16 under torch.autocast.*enabled"),
    (CancelsInHalfPrecision, check_mixed_precision, "in float32 and .* in float16. Compute"),
    (
        SquaresInHalfPrecision,
        check_mixed_precision,
        "loss_defective is inf .* features of up to 1000",
    ),
    (OverflowsInTheBackward, check_mixed_precision, "gradient of .* has a relative error of inf"),
    (PromisesZero, check_zero_at_equal, "zero_at_equal is declared, but the loss .* is"),
]


@pytest.fixture
def build() -> Iterator[Callable[[Type[nn.Module]], Case]]:
    """A Case of a class that is registered as "Defective"; forgotten after the test."""

    def build_case(cls: Type[nn.Module], pair: Pair = RETINANET) -> Case:
        DISTILL_HEAD_REGISTRY._obj_map["DefectiveHead"] = cls
        return Case("Defective", pair)

    yield build_case
    DISTILL_HEAD_REGISTRY._obj_map.pop("DefectiveHead", None)


@pytest.fixture
def clean_registry() -> Iterator[None]:
    heads = dict(DISTILL_HEAD_REGISTRY._obj_map)
    yield
    DISTILL_HEAD_REGISTRY._obj_map = heads


@pytest.mark.parametrize("cls, check, message", DEFECTS)
def test_defect_is_caught_by_its_name(
    build: Callable, cls: Type[nn.Module], check: Callable, message: str
) -> None:
    if check is check_mixed_precision and not runs_in_float16():
        pytest.skip("this PyTorch has no float16 on CPUs")
    case = build(cls)
    assert not case.refusal
    with pytest.raises(AssertionError, match=re.compile(message, re.DOTALL)):
        check(case)


def test_head_without_defects_passes_what_the_others_do_not(build: Callable) -> None:
    case = build(SoundHead)
    skipped = {check_zero_at_equal} | (set() if runs_in_float16() else {check_mixed_precision})
    for check in {check: None for _, check, _ in DEFECTS if check not in skipped}:
        check(case)


def test_what_a_head_computes_again_need_not_be_saved(build: Callable) -> None:
    class KeepsWhatItNeedNot(SoundHead):
        def __init__(self, cfg, pair):
            super().__init__(cfg, pair)
            self.grid, self.latest, self.others = None, 0.0, [nn.ReLU()]

        def forward(self, student, teacher):
            if self.grid is None:
                self.grid = torch.arange(8.0)
            loss = self.others[0](self.error(student, teacher)) * self.grid.mean()
            self.latest = loss.item()
            return {"loss_defective": loss}

    check_checkpoint(build(KeepsWhatItNeedNot))


# Of a view, what no head has to require.
ALWAYS = {"provides", "two_stage", "info", "num_classes", "num_anchors", "strides"}
ALWAYS |= {"image_size", "image_sizes", "inside_image"}
ASKING = sorted({x for x in vars(DetectorView) if not x.startswith("_")} - ALWAYS)


@pytest.mark.parametrize("member", ASKING)
def test_member_of_a_view_is_not_read_without_its_word(member: str) -> None:
    view = SimpleNamespace(_recorded={}, _answers={}, **dict.fromkeys(ASKING, 7))
    with pytest.raises(AssertionError, match=f"forward reads `{member}`, but `requires` is "):
        getattr(RequiredView(view, frozenset({"other"}), "case"), member)


def test_curt_refusal_is_caught(build: Callable) -> None:
    case = build(RefusesCurtly)
    with pytest.raises(AssertionError, match="refuses the pair with the message 'does not fit'"):
        check_refusal(case)


def test_head_without_adapters_is_told_of_the_channels(build: Callable) -> None:
    wider = build(SoundHead, RETINANET._replace(teacher_channels=64))
    with pytest.raises(AssertionError, match="32 channels here, the teacher's 64. .*adapters"):
        check_other_channels(wider)


def test_unknown_head_is_refused_when_the_suite_is_made() -> None:
    with pytest.raises(ValueError, match="unknown head 'Xyz'"):
        conformance("Xyz")
    with pytest.raises(ValueError, match="needs at least one head"):
        conformance()


def test_opts_may_hold_lists() -> None:
    suite = conformance("PKD", opts=["DISTILL.LEVELS", [["p3", "p3"]]])
    case = find_case("PKD", RETINANET, suite.opts)
    assert not case.refusal and list(case.cfg.DISTILL.LEVELS[0]) == ["p3", "p3"]


@pytest.mark.process
def test_head_of_the_readme_passes_on_the_command_line(tmp_path: Path) -> None:
    readme = (Path(ROOT) / "README.md").read_text()
    code = re.search(r"```python\n(# my_head\.py\n.*?)```", readme, re.DOTALL).group(1)
    (tmp_path / "my_head.py").write_text(code)
    # A pytest of its own does not run inside that of the tests. The check with a teacher of other
    # channels has no pair in its name.
    chosen = "retinanet-to-retinanet or other_channels"
    words = ["-m", "d2kd.conformance", tmp_path / "my_head.py", "-k", chosen]
    exit_code = python(words, tmp_path / "said")
    text = (tmp_path / "said").read_text()
    assert exit_code == 0, text
    assert re.search(r"\d\d passed", text) and "failed" not in text


def test_command_teaches_and_refuses_a_file_without_heads(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for words in ("LOSS_WEIGHT is applied once", "conformance(", "my_head.py -x"):
        assert words in text
    (tmp_path / "empty.py").write_text("")
    assert run_command("d2kd check", main, [str(tmp_path / "empty.py")]) == 2
    assert "registers no head" in capsys.readouterr().err


def test_head_that_cannot_be_built_is_told_once(tmp_path: Path, clean_registry: None) -> None:
    (tmp_path / "old.py").write_text(
        "from torch import nn\n"
        "from d2kd import DISTILL_HEAD_REGISTRY\n"
        "@DISTILL_HEAD_REGISTRY.register()\n"
        "class OldStyleHead(nn.Module):\n"
        "    def __init__(self, cfg):\n"
        "        super().__init__()\n"
    )
    with pytest.raises(TypeError, match="OldStyleHead.__init__: nothing gives 'cfg'"):
        main([str(tmp_path / "old.py")])


# What a head makes the teacher do -----------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS[:4], ids=str)
@pytest.mark.parametrize("name", head_names())
def test_teacher_computes_what_the_head_reads_and_nothing_twice(name: str, pair: Pair) -> None:
    case = find_case(name, pair)
    if case.refusal:
        pytest.skip("does not fit")
    distiller = case.fresh(own_teacher=True)
    detector, requires = distiller.teacher.model, distiller.requires
    calls = count_calls(dict(detector.named_modules()))
    case.losses(distiller)
    levels = {int(x[1:]) for x in distiller.read_levels(distiller.lessons[0].heads)}
    of_regions = {"roi_features", "regions", "roi_predictions"}
    of_cells = {"dense", "region_vectors"} | {x for x in requires if x.startswith("tower_")}
    two_stage = hasattr(detector, "roi_heads")
    if requires & (of_regions | of_cells):
        info = distiller.pair.teacher
        levels |= {int(x[1:]) for x in (*info.dense_levels, *info.shapes)}
    backbone = {k: n for k, n in calls.items() if re.match(r"backbone\.(bottom_up|fpn|top)", k)}
    assert max(backbone.values()) == backbone["backbone.bottom_up"] == 1
    outputs = {k: n for k, n in calls.items() if re.fullmatch(r"backbone\.fpn_output\d", k)}
    assert {int(k[-1]) for k, n in outputs.items() if n} <= levels | {5}  # P6 is made of P5
    asks_cells = bool(requires & (of_cells - ({"region_vectors"} if two_stage else set())))
    head = "proposal_generator.rpn_head" if two_stage else "head"
    assert calls[head] <= asks_cells
    if two_stage:
        asks_boxes = bool(requires & {"roi_predictions", "region_vectors"})
        assert calls["roi_heads"] == 0 and calls["roi_heads.box_head"] <= asks_boxes


def count_calls(modules: Dict[str, nn.Module]) -> Dict[str, int]:
    """How often each runs from now on."""
    calls = {name: 0 for name in modules}

    def count(name: str) -> Callable[..., None]:
        def on_forward(*_: Any) -> None:
            calls[name] += 1

        return on_forward

    for name, module in modules.items():
        module.register_forward_hook(count(name))
    return calls
