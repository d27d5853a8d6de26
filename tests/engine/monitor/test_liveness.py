"""A term that does nothing stops the run; watching one changes nothing."""

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import pytest
import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.structures import Instances

from d2kd import DISTILL_HEAD_REGISTRY
from d2kd.engine.monitor.liveness import Liveness, fingerprint, has_boxes
from d2kd.engine.monitor.loss_gradients import TASK, LossGradients, describe, misled, suggest
from d2kd.heads import DistillPair
from d2kd.lesson import Lesson
from d2kd.pairing.levels import LevelPair
from d2kd.schedule import WeightSchedule
from d2kd.step import Step
from d2kd.teacher import Teacher
from d2kd.views import DetectorView, MergeClasses
from tests.helpers.runs import (
    SHAPES_CLASSES,
    assert_same_tensors,
    build_trainer,
    run,
    run_config,
    scalars,
    snapshot,
)
from tests.helpers.toys import detector_config, distill_config, level_pairs, write_teacher

# What is measured ---------------------------------------------------------------------------------


def two_levels() -> Dict[str, Any]:
    """
    Features p3 = (3, 4) and p4 = (1,), of losses with known gradients there: task (3, 4) and (0);
    "loss_a" (6, 8) and (0); "loss_b" (-4, 3) and (12); "loss_c" nowhere.
    """
    p3, p4 = (torch.tensor(x, requires_grad=True) for x in ([3.0, 4.0], [1.0]))
    student = SimpleNamespace(features={"p3": p3, "p4": p4, "frozen": torch.ones(2)})
    losses = {
        "loss_cls": p3.square().sum() / 2,
        "loss_a": p3.square().sum(),
        "loss_b": (p3 * torch.tensor([-4.0, 3.0])).sum() + 12 * p4.sum(),
        "loss_c": torch.tensor(5.0),
    }
    terms = {
        "A": {"loss_a": {"p3": losses["loss_a"]}},
        "B": {"loss_b": {"": losses["loss_b"]}, "loss_c": {"": losses["loss_c"]}},
    }
    return {"losses": losses, "step": Step(student, [], terms)}


def test_norms_shares_and_cosines_are_those_of_the_gradients() -> None:
    found = LossGradients.measure(**two_levels())
    assert found.losses[TASK].levels == {"p3": 5.0, "p4": 0.0} and found.losses[TASK].norm == 5
    a, b, c = (found.losses[f"loss_{x}"] for x in "abc")
    assert (a.value, a.norm, a.cosine) == (25.0, 10.0, pytest.approx(1.0))
    # (-4, 3, 12) is 13 long and at right angles to (3, 4, 0).
    assert (b.levels, b.norm) == ({"p3": 5.0, "p4": 12.0}, pytest.approx(13.0))
    assert b.cosine == pytest.approx(0.0, abs=1e-7)
    assert (c.value, c.norm, c.cosine) == (5.0, 0.0, 0.0)
    assert found.share("loss_a") == pytest.approx(10 / (5 + 10 + 13))
    assert found.share("loss_b", "p3") == pytest.approx(5 / (5 + 10 + 5))
    assert found.share("loss_b", "p4") == 1 and found.share("loss_a", "p4") == 0


def test_losses_can_still_go_backward() -> None:
    given = two_levels()
    LossGradients.measure(**given)
    sum(given["losses"].values()).backward()
    assert given["step"].student.features["p4"].grad.tolist() == [12.0]


def test_suggested_weights_give_the_wanted_share_in_equal_parts() -> None:
    found = LossGradients.measure(**two_levels())
    schedules = {k: WeightSchedule(weight=w, max_iter=10) for k, w in (("A", 2.0), ("B", 1.0))}
    text = suggest(found, schedules, 0, share=0.5)
    # As much as the task's 5 for both together: 2.5 each. A has 10 with 2, B has 13 with 1.
    assert "DISTILL.A.LOSS_WEIGHT 0.5 (now 2)" in text
    assert f"DISTILL.B.LOSS_WEIGHT {2.5 / 13:.3g} (now 1)" in text
    # Three times the task's for a share of 0.75.
    assert "DISTILL.A.LOSS_WEIGHT 1.5 " in suggest(found, schedules, 0, 0.75)


def test_suggested_weight_is_that_without_warm_up_and_decay() -> None:
    # What was measured in the first of four steps of warm-up was measured with a quarter of 8.
    found = LossGradients.measure(**two_levels())
    schedules = {
        "A": WeightSchedule(weight=8.0, max_iter=10, warmup_iters=4),
        "B": WeightSchedule(weight=1.0, max_iter=10),
    }
    assert "DISTILL.A.LOSS_WEIGHT 0.5 (now 8)" in suggest(found, schedules, 0, 0.5)
    assert "DISTILL.A.LOSS_WEIGHT 2 (now 8)" in suggest(found, schedules, 3, 0.5)


def test_head_on_levels_that_the_student_does_not_learn_is_named() -> None:
    # B has 12 of its 13 at p4, where the task has 0 of 5; A has nothing there.
    found = LossGradients.measure(**two_levels())
    levels = dict.fromkeys("AB", level_pairs(p3=(4, 4), p4=(4, 4)))
    (text,) = misled(found, levels)
    assert text.startswith("B has 92% of its gradient at p4, where")
    assert "no object of this step" in text  # whose few images need not be like the others
    assert "If so in others, DISTILL.LEVELS \"[['p3', 'p3']]\" leaves it out" in text
    (text,) = misled(found, dict.fromkeys("AB", level_pairs(p4=(4, 4))))
    assert "DISTILL.LEVELS" not in text  # nothing would be left
    found.losses[TASK].levels["p4"] = 0.1
    assert not misled(found, levels)


def test_head_that_does_not_read_the_pairs_of_levels_is_not_told_to_leave_some_out(
    tmp_path: Path,
) -> None:
    # CKD compares regions, whatever DISTILL.LEVELS says; B has 12 of its 13 at p4, the task 0.
    values = {"DISTILL__CKD__QUEUE_SIZE": 0}
    teacher = write_teacher(tmp_path, "retinanet")
    distiller = build_model(distill_config("retinanet", teacher, ["PKD", "CKD"], **values))
    levels = distiller.levels_of_heads
    assert levels["PKD"] == distiller.pair.levels and not levels["CKD"]
    (text,) = misled(LossGradients.measure(**two_levels()), {"A": (), "B": levels["CKD"]})
    assert text.startswith("B has 92% of its gradient at p4") and "DISTILL.LEVELS" not in text


def test_table_has_every_loss_and_level_and_scalars_are_not_printed_as_losses() -> None:
    found = LossGradients.measure(**two_levels())
    text = describe(found)
    for word in (TASK, "loss_a", "loss_b", "loss_c", "gradient p3", "gradient p4", "cosine"):
        assert word in text
    assert "12 (100%)" in text and "5 (25%)" in text
    scalars = found.scalars()
    assert scalars["gradient_share_p3/b"] == pytest.approx(0.25)
    assert scalars["gradient_p4/b"] == 12 and not any("loss" in k for k in scalars)
    assert all(math.isfinite(v) for v in scalars.values())


# In a run -----------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Its loss is what `kind` says."""

    kind = ""

    @configurable
    def __init__(self, *, levels: Sequence[LevelPair]):
        super().__init__()
        self.levels = levels
        self.adapter = nn.Linear(1, 1)
        self.adapter.weight.requires_grad_(self.kind != "all frozen")
        self.adapter.bias.requires_grad_("frozen" not in self.kind)
        self.calls = 0

    @staticmethod
    def add_config(node: CfgNode) -> None:
        node.LOSS_WEIGHT = 1.0

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair) -> Dict[str, Any]:
        return {"levels": pair.levels}

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Tensor]:
        x, own = student.features["p3"], self.adapter.weight.sum()
        self.calls += 1
        if self.kind == "nothing":
            return {}
        if self.kind == "late" and not hasattr(self, "late"):
            self.late = nn.Linear(1, 1)
        if self.kind == "by level":
            terms = {k: v.square().mean() for k, v in student.features.items()}
            terms["p4"] = terms["p4"].detach()
            return {"loss_odd": {**terms, "p3": terms["p3"] * own * self.adapter.bias.sum()}}
        work = x.square().mean() * own * (1 + self.adapter.bias.sum())
        loss = {
            "late": lambda: work * self.late.weight.sum() * self.late.bias.sum(),
            "unused": lambda: x.square().mean() * own,
            "frozen": lambda: work,
            "all frozen": lambda: work,
            "sound": lambda: work,
            "later": lambda: work if self.calls < 4 else work.detach() + own,
            "detached": lambda: x.detach().square().mean() + own,
            "zero": lambda: x.sum() * 0 + own,
            "constant": lambda: 3 + (x - x.detach()).mean() + (own - own.detach()),
            "still": lambda: x.square().mean() + own * 0,
        }[self.kind]()
        return {"loss_odd": loss + (0 if self.kind == "unused" else self.adapter.bias.sum() * 0)}


@pytest.fixture
def odd() -> Iterator[Callable[[str], None]]:
    """Registers the head "Odd" of a kind; forgotten after the test."""

    def register(kind: str) -> None:
        DISTILL_HEAD_REGISTRY._obj_map["OddHead"] = type("OddHead", (Odd,), {"kind": kind})

    yield register
    DISTILL_HEAD_REGISTRY._obj_map.pop("OddHead", None)


@pytest.mark.parametrize(
    "kind, problem",
    [
        ("nothing", "it returned no loss"),
        ("unused", "no loss depends on Odd.adapter.bias"),
        ("late", "the optimizer, built before, lacks Odd.late.weight, Odd.late.bias"),
        ("detached", "loss_odd has no gradient at the student's pyramid"),
        ("zero", "loss_odd has no gradient at the student's pyramid"),
        ("constant", "loss_odd is constant, 3"),
        ("still", "none of the 2 parameters of Odd has a gradient"),
    ],
)
def test_term_that_does_nothing_stops_the_run_in_its_first_steps(
    kind: str, problem: str, odd: Callable, folder: Path, teacher: List[Any]
) -> None:
    odd(kind)
    cfg = run_config(folder, teacher, ["PKD", "Odd"])
    cfg.DISTILL.Odd.SCHEDULE.WARMUP_ITERS = 4  # which makes no constant alive
    trainer = build_trainer(cfg)
    with pytest.raises(RuntimeError, match=f"in the first 3 steps of Odd, {problem}"):
        trainer.train()
    assert trainer.iter == 2
    cfg.DISTILL.LIVENESS.ENABLED = False
    run(cfg)


@pytest.mark.parametrize(
    "kind, named",
    [
        ("frozen", r"Odd.adapter.bias \(requires_grad is False\)"),
        ("all frozen", r"Odd.adapter.weight, Odd.adapter.bias \(requires_grad is False\)"),
        ("by level", r": p4 \(no gradient there\)\."),
        ("sound", r"p4, p5, p6, p7 \(no gradient there\)\."),
    ],
)
def test_part_of_a_head_that_does_not_train_is_named(
    kind: str,
    named: str,
    odd: Callable,
    folder: Path,
    teacher: List[Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    odd(kind)
    run(run_config(folder, teacher, ["Odd"]))
    assert re.search(f"Odd did not train everything, .*{named}", caplog.text)


class Restore(HookBase):
    """Puts a parameter back after every step, before anybody looks."""

    def before_train(self) -> None:
        self.parameter = self.trainer._module.heads["Odd"].adapter.weight
        self.value = self.parameter.detach().clone()
        self.trainer.optimizer.register_step_post_hook(self.restore)

    def restore(self, *_: Any) -> None:
        self.parameter.data.copy_(self.value)


def test_parameter_with_a_gradient_that_does_not_move_stops_the_run(
    odd: Callable, folder: Path, teacher: List[Any]
) -> None:
    odd("sound")
    with pytest.raises(RuntimeError, match="Odd.adapter.weight has a gradient but is not moved"):
        run(run_config(folder, teacher, ["Odd"]), Restore())


def test_steps_too_small_to_see_do_not_stop_a_run(
    folder: Path, teacher: List[Any], caplog: pytest.LogCaptureFixture
) -> None:
    # As at the end of a schedule, from which an interrupted run may go on.
    run(run_config(folder, teacher, ["MGD"], SOLVER__BASE_LR=1e-30, SOLVER__WEIGHT_DECAY=0.0))
    assert "MGD.generator.p3.0.weight" in caplog.text and "too small a step" in caplog.text


def test_term_that_dies_later_is_named(
    odd: Callable, folder: Path, teacher: List[Any], caplog: pytest.LogCaptureFixture
) -> None:
    odd("later")
    run(run_config(folder, teacher, ["PKD", "Odd"], DISTILL__LIVENESS__PERIOD=4))
    named = "Iteration 3: what worked in the first steps does nothing now: loss_odd (no gradient"
    assert named in caplog.text and "loss_pkd (no" not in caplog.text


def test_run_too_short_to_prove_anything_says_so(
    folder: Path, teacher: List[Any], caplog: pytest.LogCaptureFixture
) -> None:
    run(run_config(folder, teacher, ["PKD"], SOLVER__MAX_ITER=2))
    assert "fewer than 3 steps with objects in which PKD was on" in caplog.text


class Scaler:
    """A GradScaler's scale: halved by each step that it skipped."""

    def __init__(self, *scales: float):
        self.scales = iter(scales)

    def get_scale(self) -> float:
        return next(self.scales)


def test_steps_that_mixed_precision_skips_prove_nothing(folder: Path, teacher: List[Any]) -> None:
    # Asked before and after each step; the first and the third are skipped.
    scaler = Scaler(8, 4, 4, 4, 4, 2, 2, 2, 2, 2)
    cfg = run_config(folder, teacher, ["PKD"], SOLVER__MAX_ITER=6, DISTILL__LIVENESS__PERIOD=0)
    assert looks(cfg, scaler) == [0, 1, 2, 3, 4]


def test_gradient_too_small_for_half_precision_is_measured_as_it_is_trained() -> None:
    given = two_levels()
    p3 = torch.tensor([3.0, 4.0], dtype=torch.half, requires_grad=True)
    given["step"].student.features["p3"] = p3
    given["losses"]["loss_a"] = 1e-9 * p3.float().sum()
    assert LossGradients.measure(**given).losses["loss_a"].norm == 0
    found = LossGradients.measure(**given, scale=2.0**16)
    assert found.losses["loss_a"].norm == pytest.approx(1e-9 * math.sqrt(2), rel=1e-2)


def watch(trainer: Any) -> Liveness:
    return next(x for x in trainer._hooks if isinstance(x, Liveness))


def test_training_is_the_same_to_the_bit(folder: Path, teacher: List[Any]) -> None:
    states = []
    for enabled in (True, False):
        cfg = run_config(folder, teacher, ["MGD", "PKD"], DISTILL__LIVENESS__ENABLED=enabled)
        trainer = run(cfg)
        assert any(isinstance(x, Liveness) for x in trainer._hooks) == enabled
        states.append(snapshot(trainer._module))
    assert_same_tensors(*states)


def looks(cfg: CfgNode, scaler: Optional["Scaler"] = None) -> List[int]:
    """The iterations of a run that were watched."""
    trainer = build_trainer(cfg)
    trainer._trainer.grad_scaler = scaler
    hook, seen = watch(trainer), []
    measure = hook._measure

    def counted(*args: Any) -> None:
        seen.append(trainer.iter)
        measure(*args)

    hook._measure = counted
    trainer.train()
    assert not trainer._module._forward_hooks, "nothing is left that would cost time"
    return seen


def test_first_steps_and_then_every_period_are_watched(folder: Path, teacher: List[Any]) -> None:
    cfg = run_config(folder, teacher, ["PKD"], SOLVER__MAX_ITER=9, DISTILL__LIVENESS__PERIOD=4)
    assert looks(cfg) == [0, 1, 2, 3, 7]
    cfg.DISTILL.LIVENESS.PERIOD, cfg.DISTILL.LIVENESS.FIRST_STEPS = 0, 2
    assert looks(cfg) == [0, 1]


def test_head_that_is_switched_off_is_not_watched(
    folder: Path, teacher: List[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="d2kd")
    cfg = run_config(folder, teacher, ["PKD"], SOLVER__MAX_ITER=6, DISTILL__LIVENESS__PERIOD=0)
    assert looks(cfg) == [0, 1, 2]
    assert "What each loss does to the student" in caplog.text and "loss_pkd" in caplog.text
    cfg.DISTILL.PKD.SCHEDULE.STOP_ITER = 2
    assert looks(cfg) == [0, 1]


def test_steps_without_any_object_prove_nothing(
    folder: Path, teacher: List[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([False, True, False, True, True])
    monkeypatch.setattr("d2kd.engine.monitor.liveness.has_boxes", lambda *_: next(answers))
    cfg = run_config(folder, teacher, ["PKD"], SOLVER__MAX_ITER=7, DISTILL__LIVENESS__PERIOD=0)
    assert looks(cfg) == [0, 1, 2, 3, 4]


def test_objects_of_classes_that_the_student_alone_knows_prove_nothing() -> None:
    none, own = torch.zeros(0, dtype=torch.int64), torch.tensor([1, 1])
    objects = [Instances((64, 64), gt_classes=x) for x in (none, own)]
    step = Step(SimpleNamespace(gt_instances=objects, batched_inputs=[]), [])
    model = build_model(detector_config("retinanet"))
    same, other = (Lesson(Teacher(model, "BGR", {}), [x]) for x in ("PKD", "MGD"))
    other.merges.append(MergeClasses([[0], [2]], num_classes=3))
    distiller = SimpleNamespace(last_step=step, lessons=[same, other])
    assert has_boxes(distiller, "PKD") and not has_boxes(distiller, "MGD")
    objects.append(Instances((64, 64), gt_classes=torch.tensor([2])))
    assert has_boxes(distiller, "MGD")
    objects[:] = [Instances((64, 64), gt_classes=none)]
    assert not has_boxes(distiller, "PKD")


def test_part_without_weight_is_said_and_does_not_stop_a_head_that_works(
    folder: Path, teacher: List[Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="d2kd")
    cfg = run_config(folder, teacher, ["FGD"])
    cfg.DISTILL.FGD.GLOBAL_WEIGHT = 0.0
    run(cfg)
    assert "loss_fgd_global is 0: it has no weight" in caplog.text
    for part in ("FOREGROUND", "BACKGROUND", "ATTENTION"):
        cfg.DISTILL.FGD[f"{part}_WEIGHT"] = 0.0
    with pytest.raises(RuntimeError, match="loss_fgd_foreground has no gradient"):
        run(cfg)


class TouchTheTeacher(HookBase):
    def __init__(self, touch: Callable[[nn.Module], Any]):
        self.touch = touch

    def after_step(self) -> None:
        self.touch(self.trainer._module.teacher.model)


@pytest.mark.parametrize(
    "touch",
    [
        lambda model: next(model.parameters()).data.view(-1)[:1].add_(1e-3),
        lambda model: model.pixel_mean.add_(1),  # in no state dict
    ],
)
def test_teacher_that_changed_is_told_at_the_end(
    touch: Callable, folder: Path, teacher: List[Any]
) -> None:
    with pytest.raises(RuntimeError, match="The teacher's parameters or buffers changed"):
        run(run_config(folder, teacher, ["PKD"]), TouchTheTeacher(touch))


@pytest.mark.parametrize(
    "touch, problem",
    [
        (lambda model: model.train(), "The teacher is in training mode"),
        (lambda model: model.requires_grad_(), "The teacher's parameters require gradients"),
    ],
)
def test_teacher_that_is_about_to_change_is_told_at_the_next_look(
    touch: Callable, problem: str, folder: Path, teacher: List[Any]
) -> None:
    trainer = build_trainer(run_config(folder, teacher, ["PKD"]))
    trainer.register_hooks([TouchTheTeacher(touch)])
    with pytest.raises(RuntimeError, match=problem):
        trainer.train()
    assert trainer.iter == 1


def test_error_of_a_run_is_not_hidden_by_one_about_the_teacher(
    folder: Path, teacher: List[Any]
) -> None:
    def touch(model: nn.Module) -> None:
        next(model.parameters()).data.add_(1)
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        run(run_config(folder, teacher, ["PKD"]), TouchTheTeacher(touch))


def test_fingerprint_sees_one_bit_and_one_name() -> None:
    a, b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    assert fingerprint(a) == fingerprint(b)
    b.running_mean[1] = 1e-45  # the smallest float there is
    assert fingerprint(a) != fingerprint(b)
    assert fingerprint(nn.Sequential(a)) != fingerprint(a)


def test_head_outside_the_optimizer_is_refused(folder: Path, teacher: List[Any]) -> None:
    trainer = build_trainer(run_config(folder, teacher, ["MGD"]))
    model = trainer._module
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="does not have MGD.adapter.* of the heads"):
        Liveness(model, optimizer, trainer.cfg)


def test_learning_rate_of_0_is_refused(folder: Path, teacher: List[Any]) -> None:
    trainer = build_trainer(run_config(folder, teacher, ["MGD"]))
    model = trainer._module
    groups = [
        {"params": list(model.student.parameters()), "lr": 0.1},
        {"params": list(model.heads.parameters()), "lr": 0.0},
    ]
    with pytest.raises(ValueError, match="MGD.adapter.* with a learning rate of 0"):
        Liveness(model, torch.optim.SGD(groups), trainer.cfg)


def test_learning_rate_of_0_for_one_head_is_refused_and_for_its_biases_is_not(
    folder: Path, teacher: List[Any]
) -> None:
    cfg = run_config(folder, teacher, ["MGD", "FGD"], SOLVER__BIAS_LR_FACTOR=0.0)
    trainer = run(cfg)
    groups, mine = trainer.optimizer.param_groups, trainer._module.heads.MGD
    biases = {id(p) for k, p in mine.named_parameters() if k.endswith(".bias")}
    assert biases & {id(p) for x in groups if x["initial_lr"] == 0 for p in x["params"]}
    of_mgd = {id(p) for p in mine.parameters()}
    for group in groups:
        group["initial_lr"] *= not of_mgd & {id(p) for p in group["params"]}
    with pytest.raises(ValueError, match="MGD.adapter.* of MGD with a learning rate of 0"):
        Liveness(trainer._module, trainer.optimizer, cfg)


class FreezeThePyramid(HookBase):
    def before_train(self) -> None:
        self.trainer._module.student.backbone.requires_grad_(False)


def test_frozen_pyramid_is_warned_of_and_a_head_on_logits_goes_on(
    odd: Callable, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    values = {"MODEL__FPN__OUT_CHANNELS": 64, "MODEL__RETINANET__NUM_CLASSES": SHAPES_CLASSES}
    opts = write_teacher(tmp_path, "retinanet", **values)
    cfg = run_config(folder, opts, ["BCKD"], DISTILL__LIVENESS__PERIOD=4)
    assert scalars(run(cfg, FreezeThePyramid()))["loss_bckd_cls"].keys() == {0, 1, 2, 3}
    assert "The student's pyramid is frozen: no loss has a gradient there" in caplog.text
    # What is certainly wrong still is.
    odd("still")
    with pytest.raises(RuntimeError, match="none of the 2 parameters of Odd has a gradient"):
        run(run_config(folder, opts, ["Odd"]), FreezeThePyramid())


def test_student_alone_is_not_watched(folder: Path) -> None:
    trainer = run(run_config(folder, SOLVER__MAX_ITER=1))
    assert not any(isinstance(x, Liveness) for x in trainer._hooks)
