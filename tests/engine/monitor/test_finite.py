"""A loss that is not finite stops the run with its term, level, features and images."""

import math
from typing import Any, Dict, Iterator, List, Optional

import pytest
import torch
from torch import Tensor, nn

from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage

from d2kd.engine.monitor.finite import FiniteLossMixin, explain
from d2kd.step import Step
from tests.helpers.toys import feature_view


def step(p4: float = 1.0, student: float = 1.0, teacher: float = 1.0) -> Step:
    """Distiller.last_step; the arguments are values that may not be finite."""
    features = [{"p3": torch.ones(1, 2, 3, 4), "p4": torch.ones(1, 2, 2, 2)} for _ in range(2)]
    features[0]["p3"][0, 0, 0, :3] = student
    features[1]["p4"][0, 1, 0, 0] = teacher
    by_level = {"p3": torch.tensor(1.0), "p4": torch.tensor(p4)}
    views = [feature_view(x) for x in features]
    return Step(views[0], views[1:], terms={"MGD": {"loss_mgd": by_level}})


def test_explanation_names_term_level_and_images() -> None:
    losses = {"loss_cls": 0.5, "loss_mgd": math.nan}
    text = explain(losses, step(p4=math.nan), ["a.png", "b.png"])
    assert text.startswith("Loss not finite: loss_mgd = nan.")
    assert "loss_mgd is not finite at level p4" in text
    assert "images of the batch: a.png, b.png" in text
    assert "'loss_cls': 0.5" in text
    assert "features at" not in text, "those are finite"


def test_explanation_names_the_side_whose_features_are_not_finite() -> None:
    text = explain({"loss_mgd": math.inf}, step(student=math.nan, teacher=math.inf), ["a.png"])
    assert "the student's features at p3 have 3 values that are not finite" in text
    assert "the teacher's features at p4 have 1 values that are not finite" in text


def test_explanation_names_which_of_several_teachers() -> None:
    bad = step(teacher=math.inf)
    bad.teachers = [*step().teachers, *bad.teachers]
    text = explain({"loss_b_mgd": math.inf}, bad, ["a.png"], teachers=["a", "b"])
    assert "the teacher b's features at p4 have 1 values" in text and "teacher a" not in text


def test_level_is_named_where_a_finite_term_overflows_with_its_weight() -> None:
    # Neither level is infinite by itself: then no level is to blame.
    text = explain({"loss_mgd": math.inf}, step(), ["a.png"])
    assert "at level" not in text


def test_explanation_of_a_plain_detector_has_losses_and_images() -> None:
    text = explain({"loss_cls": math.inf, "loss_box_reg": -math.inf}, None, ["a.png"])
    assert "loss_cls = inf, loss_box_reg = -inf" in text and "a.png" in text


def test_explanation_without_losses_says_what_stopped_the_student() -> None:
    text = explain({}, step(student=math.nan), ["a.png"], "Not finite: boxes.")
    assert text.startswith("Not finite: boxes.\n  the student's features at p3 have 3")
    assert "images of the batch: a.png" in text and "all losses" not in text


class Broken(nn.Module):
    """Its loss is not finite from the given call on."""

    def __init__(self, first_bad: int):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))
        self.calls = 0
        self.first_bad = first_bad
        self.last_step: Optional[Step] = None

    def forward(self, batched_inputs: List[Dict[str, Any]]) -> Dict[str, Tensor]:
        self.calls += 1
        self.last_step = step(p4=math.nan)
        factor = math.nan if self.calls > self.first_bad else 1.0
        return {"loss_cls": self.weight * 1.0, "loss_mgd": self.weight * factor}


class Trainer(FiniteLossMixin, SimpleTrainer):
    pass


def test_trainer_stops_before_the_step_with_the_batch_of_that_iteration() -> None:
    def batches() -> Iterator[List[Dict[str, Any]]]:
        i = 0
        while True:
            yield [{"file_name": f"image_{i}.png"}, {}]
            i += 1

    model = Broken(first_bad=2)
    trainer = Trainer(model, batches(), torch.optim.SGD(model.parameters(), lr=0.1))
    with EventStorage():
        trainer.iter = 0
        for _ in range(2):
            trainer.run_step()
        before = model.weight.item()
        with pytest.raises(FloatingPointError) as error:
            trainer.run_step()
    # Gradient 2 in each of two steps: 1 - 2 x 0.2.
    assert before == pytest.approx(0.6) and model.weight.item() == before
    assert "loss_mgd is not finite at level p4" in str(error.value)
    assert "images of the batch: image_2.png, ?" in str(error.value)
