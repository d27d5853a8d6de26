"""TensorBoard's picture of distillation: when it is drawn, and that training does not notice."""

from pathlib import Path
from typing import Any, Dict, List, Tuple

import numpy as np
import pytest

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from tests.helpers.runs import assert_same_tensors, run, run_config, scalars, snapshot
from tests.helpers.toys import batch, distill_config

Images = List[Tuple[str, int, np.ndarray]]  # name, iteration, picture


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch) -> Images:
    """All images given to a storage; the writer empties it."""
    given: Images = []
    put_image = EventStorage.put_image

    def put(self: EventStorage, name: str, image: Any) -> None:
        given.append((name, self.iter, image))
        put_image(self, name, image)

    monkeypatch.setattr(EventStorage, "put_image", put)
    return given


def config(folder: Path, output: str, teacher: List[Any], **overrides: Any) -> CfgNode:
    return run_config(folder, teacher, OUTPUT_DIR=str(folder / output), **overrides)


def panels(images: Images) -> Dict[int, np.ndarray]:
    return {iteration: image for name, iteration, image in images if name == "distillation"}


def test_panel_is_drawn_at_the_interval_only(
    folder: Path, teacher: List[Any], images: Images
) -> None:
    run(config(folder, "interval", teacher, VIS_PERIOD=3))
    assert list(panels(images)) == [0, 3]
    for image in panels(images).values():
        assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[0] == 3
    assert any(x.name.startswith("events") for x in (folder / "interval").iterdir())


def test_panel_is_drawn_before_the_evaluation_takes_its_place(
    folder: Path, teacher: List[Any], images: Images
) -> None:
    values = {"TEST__EVAL_PERIOD": 1, "DATASETS__TEST": ("d2kd_shapes_val",)}
    run(config(folder, "evaluated", teacher, VIS_PERIOD=2, **values))
    assert list(panels(images)) == [0, 2]


def test_without_period_or_teacher_nothing_is_drawn(
    folder: Path, teacher: List[Any], images: Images
) -> None:
    run(config(folder, "off", teacher))
    run(config(folder, "alone", [], VIS_PERIOD=1))
    run(config(folder, "disabled", teacher, VIS_PERIOD=1, DISTILL__ENABLED=False))
    assert not panels(images)


@pytest.mark.parametrize("student", ["retinanet", "faster_rcnn"])
def test_training_is_the_same_with_and_without_pictures(
    student: str, folder: Path, teacher: List[Any], images: Images
) -> None:
    plain = run(config(folder, f"plain_{student}", teacher, student=student))
    assert not images
    shown = run(config(folder, f"shown_{student}", teacher, student=student, VIS_PERIOD=1))
    assert len(panels(images)) == 4
    assert scalars(shown) == scalars(plain)
    assert_same_tensors(snapshot(shown.model), snapshot(plain.model))


def test_instances_stay_where_detectron2_can_draw_them(teacher: List[Any]) -> None:
    # Its visualize_training, which the same key switches on, reads the boxes with .numpy().
    distiller = build_model(distill_config("retinanet", teacher)).train()
    inputs = batch()
    with EventStorage():
        distiller(inputs)
    seen = distiller.last_step.student.batched_inputs
    assert [x["instances"] for x in seen] == [x["instances"] for x in inputs]
