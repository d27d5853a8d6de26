"""A term that does nothing stops the run; watching one changes nothing."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, Iterator, List

import pytest
import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.engine import HookBase

from d2kd import DISTILL_HEAD_REGISTRY
from d2kd.engine.liveness import Liveness, fingerprint
from d2kd.engine.loss_gradients import TASK, LossGradients, describe, suggest_weights
from d2kd.heads import DistillPair
from d2kd.views import DetectorView

from runs import assert_same_tensors, build_trainer, run, run_config, snapshot

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
    keys = {"A": ["loss_a"], "B": ["loss_b", "loss_c"]}
    return {"losses": losses, "latest": {"student": student, "keys": keys}}


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


def test_losses_can_still_go_backward() -> None:
    given = two_levels()
    LossGradients.measure(**given)
    sum(given["losses"].values()).backward()
    assert given["latest"]["student"].features["p4"].grad.tolist() == [12.0]


def test_suggested_weights_give_the_wanted_share_in_equal_parts() -> None:
    found = LossGradients.measure(**two_levels())
    text = suggest_weights(found, {"A": 2.0, "B": 1.0}, share=0.5)
    # As much as the task's 5 for both together: 2.5 each. A has 10 with 2, B has 13 with 1.
    assert "DISTILL.A.LOSS_WEIGHT 0.5 (now 2)" in text
    assert f"DISTILL.B.LOSS_WEIGHT {2.5 / 13:.3g} (now 1)" in text
    # Three times the task's for a share of 0.75.
    assert "DISTILL.A.LOSS_WEIGHT 1.5 " in suggest_weights(found, {"A": 2.0, "B": 1.0}, 0.75)


def test_table_has_every_loss_and_level_and_scalars_are_not_printed_as_losses() -> None:
    found = LossGradients.measure(**two_levels())
    text = describe(found)
    for word in (TASK, "loss_a", "loss_b", "loss_c", "gradient p3", "gradient p4", "cosine"):
        assert word in text
    scalars = found.scalars()
    assert scalars["gradient_p4/b"] == 12 and not any("loss" in k for k in scalars)
    assert all(math.isfinite(v) for v in scalars.values())


# In a run -----------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Its loss is what `kind` says."""

    kind = ""

    @configurable
    def __init__(self):
        super().__init__()
        self.adapter = nn.Linear(1, 1)

    @staticmethod
    def add_config(node: CfgNode) -> None:
        node.LOSS_WEIGHT = 1.0

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair) -> Dict[str, Any]:
        return {}

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Tensor]:
        x, own = student.features["p3"], self.adapter.weight.sum()
        loss = {
            "detached": lambda: x.detach().square().mean() + own,
            "zero": lambda: x.sum() * 0 + own,
            "constant": lambda: 3 + (x - x.detach()).mean() + (own - own.detach()),
            "still": lambda: x.square().mean() + own * 0,
        }[self.kind]()
        return {"loss_odd": loss + self.adapter.bias.sum() * 0}


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
        ("detached", "loss_odd has no gradient at the student's pyramid"),
        ("zero", "loss_odd has no gradient at the student's pyramid"),
        ("constant", "loss_odd is constant, 3"),
        ("still", "none of the 2 parameters of Odd has changed"),
    ],
)
def test_term_that_does_nothing_stops_the_run_in_its_first_steps(
    kind: str, problem: str, odd: Callable, folder: Path, teacher: List[Any]
) -> None:
    odd(kind)
    no_decay = {"SOLVER__WEIGHT_DECAY": 0.0, "SOLVER__WEIGHT_DECAY_BIAS": 0.0}
    cfg = run_config(folder, teacher, ["PKD", "Odd"], **no_decay)
    trainer = build_trainer(cfg)
    with pytest.raises(RuntimeError, match=f"in the first 3 steps of Odd, {problem}"):
        trainer.train()
    assert trainer.iter == 2
    cfg.DISTILL.LIVENESS.ENABLED = False
    run(cfg)


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


def looks(cfg: CfgNode) -> List[int]:
    """The iterations of a run that were watched."""
    trainer = build_trainer(cfg)
    hook, seen = watch(trainer), []
    look = hook._look

    def counted(*args: Any) -> None:
        seen.append(trainer.iter)
        look(*args)

    hook._look = counted
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
    monkeypatch.setattr("d2kd.engine.liveness.has_boxes", lambda student: next(answers))
    cfg = run_config(folder, teacher, ["PKD"], SOLVER__MAX_ITER=7, DISTILL__LIVENESS__PERIOD=0)
    assert looks(cfg) == [0, 1, 2, 3, 4]


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
    def after_step(self) -> None:
        with torch.no_grad():
            next(self.trainer._module.teacher.model.parameters()).view(-1)[0] += 1e-3


def test_teacher_that_changed_is_told_at_the_end(folder: Path, teacher: List[Any]) -> None:
    with pytest.raises(RuntimeError, match="The teacher's parameters or buffers changed"):
        run(run_config(folder, teacher, ["PKD"]), TouchTheTeacher())


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


def test_student_alone_is_not_watched(folder: Path) -> None:
    trainer = run(run_config(folder, SOLVER__MAX_ITER=1))
    assert not any(isinstance(x, Liveness) for x in trainer._hooks)
