"""Images without labels: what heads learn from them, and what the student's own losses do not."""

import json
from pathlib import Path
from typing import Any, Dict, List, Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from d2kd.conformance.detectors import enliven
from d2kd.data import register_datasets
from d2kd.data.loader import build_train_loader
from d2kd.data.unlabelled import batch_sizes, find_unlabelled
from d2kd.distiller import Distiller
from d2kd.engine.preflight.check_config import check_config
from d2kd.pairing.classes import match_classes
from d2kd.teacher.stand_in import confident
from d2kd.views import DenseView
from tests.helpers.runs import (
    assert_same_tensors,
    assert_two_train_as_one,
    interrupt,
    run,
    run_config,
    saved,
)
from tests.helpers.toy_sets import name_sets, write_set
from tests.helpers.toys import GROUP_NORM, batch, distill_config, write_teacher
from tests.helpers.view_toys import masked_batch, needs_fcos

SETS = {"DISTILL__UNLABELLED__SETS": ["a_folder"]}
WITH_BOXES = {**SETS, "DISTILL__UNLABELLED__BOX_SCORE": 0.01}
DETECTORS = [
    "retinanet",
    "reppoints",
    "faster_rcnn",
    "cascade_rcnn",
    pytest.param("fcos", marks=needs_fcos),
]


def without_labels(inputs: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    return [{k: v for k, v in x.items() if k != "instances"} for x in inputs]


def build(
    tmp_path: Path, name: str = "retinanet", heads: Sequence[str] = ("PKD",), **keys: Any
) -> Distiller:
    """Two lively detectors of one kind whose norms do not depend on the batch."""
    opts = write_teacher(tmp_path, name, **GROUP_NORM)
    torch.manual_seed(0)
    distiller = build_model(distill_config(name, opts, heads, **GROUP_NORM, **{**SETS, **keys}))
    if name != "cascade_rcnn":
        enliven(distiller.student)
        enliven(distiller.teacher.model)
    return distiller.train()


def losses_of(distiller: Distiller, inputs: List[Dict[str, Any]], seed: int = 3) -> Dict[str, Any]:
    torch.manual_seed(seed)
    with EventStorage():
        return distiller(inputs)


# What is computed ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DETECTORS)
def test_head_on_features_learns_the_same_without_labels(name: str, tmp_path: Path) -> None:
    distiller, inputs = build(tmp_path, name), masked_batch()
    with_them = losses_of(distiller, inputs)
    without = losses_of(distiller, without_labels(inputs))
    assert set(without) == {"loss_pkd"}
    torch.testing.assert_close(without["loss_pkd"], with_them["loss_pkd"])


@pytest.mark.parametrize("head", ["MLD", "DIST"])
def test_head_on_logits_learns_the_same_without_labels(head: str, tmp_path: Path) -> None:
    distiller, inputs = build(tmp_path, heads=[head]), batch()
    with_them = losses_of(distiller, inputs)
    without = losses_of(distiller, without_labels(inputs))
    assert without and all(v > 0 for v in without.values())
    for key, loss in without.items():
        torch.testing.assert_close(loss, with_them[key])


def test_mixed_batch_has_the_student_s_losses_of_the_labelled_and_the_mean_of_the_head(
    tmp_path: Path,
) -> None:
    distiller = build(tmp_path, heads=["CWD"])
    labelled, others = batch(2, seed=1), without_labels(batch(3, seed=2))
    before = dict(vars(distiller.student))  # the newest has no loss_normalizer before a step
    alone = losses_of(distiller, labelled)
    vars(distiller.student).clear()
    vars(distiller.student).update(before)
    unlabelled = losses_of(distiller, others)
    moved = getattr(distiller.student, "loss_normalizer", None)
    assert moved == before.get("loss_normalizer"), "moved by images without labels"
    mixed = losses_of(distiller, [*labelled, *others])
    for key in ("loss_cls", "loss_box_reg"):
        assert torch.equal(mixed[key], alone[key])
    expected = 2 / 5 * alone["loss_cwd"] + 3 / 5 * unlabelled["loss_cwd"]
    torch.testing.assert_close(mixed["loss_cwd"], expected)
    terms = distiller.last_step.losses["loss_cwd"]
    weight = distiller.schedules["CWD"](0)
    torch.testing.assert_close(sum(terms.values()) * weight, mixed["loss_cwd"])


class LevelOfItsOwn(nn.Module):
    """A head that has 1 at one level of two images, and at another one of three."""

    def forward(self, student: Any, teacher: Any) -> Dict[str, Any]:
        return {"loss_pkd": {f"of {len(student.image_sizes)}": torch.ones(())}}


def test_part_of_a_mixed_batch_counts_by_its_images_and_their_size_at_any_level(
    tmp_path: Path,
) -> None:
    distiller = build(tmp_path)
    distiller.heads["PKD"] = LevelOfItsOwn()
    distiller.schedules["PKD"] = lambda iteration: 10.0
    distiller.reference_pixels["PKD"] = 64 * 64
    others = without_labels(batch(3, height=32))  # half as many pixels: twice the weight
    losses = losses_of(distiller, [*batch(2), *others])
    terms = distiller.last_step.losses["loss_pkd"]
    assert {k: x.item() for k, x in terms.items()} == pytest.approx(
        {"of 2": 2 / 5 * 1, "of 3": 3 / 5 * 2}
    )
    assert losses["loss_pkd"].item() == pytest.approx(10 * (2 / 5 + 6 / 5))


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn"])
def test_gradient_of_unlabelled_images_reaches_the_student_and_never_the_teacher(
    name: str, tmp_path: Path
) -> None:
    distiller = build(tmp_path, name)
    losses = losses_of(distiller, without_labels(batch()))
    sum(losses.values()).backward()
    bottom_up = list(distiller.student.backbone.bottom_up.parameters())
    assert all(p.grad is not None for p in bottom_up)
    assert sum(p.grad.abs().sum() for p in bottom_up) > 0
    assert all(p.grad is None for p in distiller.teacher.model.parameters())


@pytest.mark.parametrize("has_parameters", [True, False])
def test_step_without_labels_and_with_every_head_off_has_no_gradient(
    has_parameters: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros and not None, which DistributedDataParallel would take for an error."""
    distiller = build(tmp_path, heads=["FGD"], **WITH_BOXES)
    distiller.schedules["FGD"] = lambda iteration: 0.0
    if not has_parameters:
        distiller.heads["FGD"] = nn.Identity()
    monkeypatch.setattr(DenseView, "detections", lambda _: pytest.fail("the teacher is asked"))
    losses = losses_of(distiller, without_labels(batch()))
    sum(losses.values()).backward()
    assert all(not p.grad.any() for p in distiller.parameters())


# What stands in for boxes -------------------------------------------------------------------------


@pytest.mark.parametrize("name, head", [("retinanet", "FGD"), ("retinanet", "MAR")])
def test_teacher_s_boxes_stand_in_for_labels(name: str, head: str, tmp_path: Path) -> None:
    # The same loss as on images whose labels are those boxes.
    distiller = build(tmp_path, name, [head], **WITH_BOXES)
    images = without_labels(batch(seed=5))
    view = distiller.view_of_teacher(images)
    found = confident(view.detections(), 0.01)
    assert sum(len(x) for x in found) > 2
    labelled = [{**x, "instances": y} for x, y in zip(images, found)]
    expected = losses_of(distiller, labelled)
    losses = losses_of(distiller, images)
    assert set(losses) == {k for k in expected if head.lower() in k}
    for key, loss in losses.items():
        torch.testing.assert_close(loss, expected[key])
    assert "instances" not in images[0], "the batch is the loader's"


def test_teacher_s_boxes_are_in_both_views_also_of_a_teacher_with_other_channels(
    tmp_path: Path,
) -> None:
    distiller = build(tmp_path, heads=["FGD"], **WITH_BOXES)
    distiller.teacher.image_format = "RGB"
    images = without_labels(batch(seed=5))
    losses_of(distiller, images)
    found = confident(distiller.view_of_teacher(images).detections(), 0.01)
    step = distiller.last_step
    assert not torch.equal(*(x.batched_inputs[0]["image"] for x in (step.student, step.teacher)))
    for view in (step.student, step.teacher):
        for x, expected in zip(view.gt_instances, found):
            assert len(x) > 0 and torch.equal(x.gt_boxes.tensor, expected.gt_boxes.tensor)


def test_regions_of_a_dense_student_are_sampled_around_the_teacher_s_boxes(tmp_path: Path) -> None:
    distiller = build(tmp_path, heads=["RoIFI"], **WITH_BOXES)
    losses = losses_of(distiller, without_labels(batch()))
    assert losses["loss_roifi"] > 0


def test_teacher_s_features_are_those_of_the_pass_that_detects(tmp_path: Path) -> None:
    distiller = build(tmp_path, heads=["FGD"], **WITH_BOXES)
    calls: List[Any] = []
    backbone = distiller.teacher.model.backbone
    backbone.bottom_up.register_forward_hook(lambda *args: calls.append(1))
    losses_of(distiller, without_labels(batch()))
    assert len(calls) == 1


@pytest.mark.parametrize("head, detects", [("PKD", False), ("FGD", True), ("RoIFI", True)])
def test_teacher_detects_for_heads_that_need_boxes(
    head: str, detects: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, own = [], DenseView.detections

    def count(view: DenseView) -> List[Instances]:
        asked.append(1)
        return own(view)

    monkeypatch.setattr(DenseView, "detections", count)
    losses_of(build(tmp_path, heads=[head], **WITH_BOXES), without_labels(batch()))
    assert bool(asked) == detects


def detections(scores: Sequence[float], classes: Sequence[int]) -> Instances:
    x = Instances((10, 20))
    x.pred_boxes = Boxes(torch.arange(4.0 * len(scores)).view(-1, 4))
    x.scores, x.pred_classes = torch.tensor(scores), torch.tensor(classes)
    return x


def test_confident_detections_of_common_classes_are_kept() -> None:
    classes = match_classes(["cat", "dog"], ["dog", "cow", "cat"])
    (found,) = confident([detections([0.9, 0.8, 0.4, 0.5], [0, 1, 2, 2])], 0.5, classes)
    # Dog 0 is the student's 1; the cow is nobody's; of two cats the second has the score.
    assert found.gt_classes.tolist() == [1, 0]
    assert found.gt_boxes.tensor[:, 0].tolist() == [0.0, 12.0]
    assert found.image_size == (10, 20)


@pytest.mark.parametrize(
    "name, head, keys, expected",
    [
        ("retinanet", "FGD", {}, "FGD needs the boxes of each image. Set .*BOX_SCORE"),
        ("retinanet", "RoIFI", {}, "RoIFI needs the boxes of each image. Set .*BOX_SCORE"),
        ("retinanet", "BCKD", WITH_BOXES, "BCKD needs anchor_labels, which a RetinaNet has of lab"),
        ("faster_rcnn", "DKD", WITH_BOXES, "DKD needs regions, roi_predictions, which a Gener"),
    ],
)
def test_head_that_cannot_learn_without_labels_is_refused(
    name: str, head: str, keys: Any, expected: str, tmp_path: Path
) -> None:
    opts = write_teacher(tmp_path, name)
    with pytest.raises(ValueError, match=f"DISTILL.UNLABELLED.SETS: {expected}"):
        build_model(distill_config(name, opts, [head], **{**SETS, **keys}))


# Batches ------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """Five images that differ."""
    (tmp_path / "others").mkdir()
    for i in range(5):
        Image.new("RGB", (64, 64), (50 * i, 0, 0)).save(tmp_path / "others" / f"{i}.png")
    return str(tmp_path / "others")


def mixed_config(tmp_path: Path, folder: str, heads: Sequence[str] = ("PKD",), **keys: Any) -> Any:
    values = {
        "DISTILL__UNLABELLED__SETS": [folder],
        "SOLVER__IMS_PER_BATCH": 4,
        "DISTILL__UNLABELLED__SHARE": 0.5,
        **keys,
    }
    return run_config(tmp_path, write_teacher(tmp_path, "retinanet"), heads, **values)


def stream(cfg: Any, start: int, count: int) -> List[List[Any]]:
    register_datasets(cfg, "")
    loader = build_train_loader(cfg, seed=1)
    loader.start_iter = start
    batches = iter(loader)
    return [
        [(x["file_name"], "instances" in x, x["image"].sum().item()) for x in next(batches)]
        for _ in range(count)
    ]


def test_labelled_images_are_those_of_a_run_without_others(tmp_path: Path, folder: str) -> None:
    mixed = stream(mixed_config(tmp_path, folder), 0, 4)
    alone = stream(run_config(tmp_path, SOLVER__IMS_PER_BATCH=2), 0, 4)
    assert [x[:2] for x in mixed] == alone
    assert all([y[1] for y in x] == [True, True, False, False] for x in mixed)
    assert len({y[0] for x in mixed for y in x[2:]}) == 5, "each of five in eight draws"


def test_student_alone_has_the_same_labelled_images(tmp_path: Path, folder: str) -> None:
    cfg = mixed_config(tmp_path, folder, DISTILL__ENABLED=False)
    assert stream(cfg, 0, 3) == [x[:2] for x in stream(mixed_config(tmp_path, folder), 0, 3)]


def test_plain_student_has_labelled_images_alone(tmp_path: Path, folder: str) -> None:
    cfg = mixed_config(tmp_path, folder)
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    assert batch_sizes(cfg) == (2, 0)


def test_stream_goes_on_where_it_stopped(tmp_path: Path, folder: str) -> None:
    cfg = mixed_config(tmp_path, folder)
    assert stream(cfg, 2, 2) == stream(cfg, 0, 4)[2:]


def test_no_two_images_of_a_batch_are_augmented_alike(tmp_path: Path, folder: str) -> None:
    """Though both parts count their places from 0."""
    cfg = mixed_config(tmp_path, folder)
    register_datasets(cfg, "")
    loader = build_train_loader(cfg, seed=1, mapper=lambda image: np.random.rand())
    drawn = [x for _, batch in zip(range(3), loader) for x in batch]
    assert len(set(drawn)) == len(drawn) == 12


def test_run_is_not_resumed_with_other_images_without_labels(tmp_path: Path, folder: str) -> None:
    cfg = mixed_config(tmp_path, folder)
    interrupt(cfg, 2)
    (Path(folder) / "4.png").unlink()
    message = r"DATASETS.TRAIN or DISTILL.UNLABELLED.SETS: .*\(13 images then, 12 now"  # 8 labelled
    with pytest.raises(ValueError, match=message):
        run(cfg, resume=True)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_resumed_run_has_the_same_weights(tmp_path: Path, folder: str, share: float) -> None:
    keys = {"DISTILL__UNLABELLED__SHARE": share, "VIS_PERIOD": 2}
    cfg = mixed_config(tmp_path, folder, **keys)
    whole = run(cfg)
    expected = saved(cfg)["model"]
    cfg.OUTPUT_DIR = str(tmp_path / "again")
    interrupt(cfg, 2)
    run(cfg, resume=True)
    assert_same_tensors(saved(cfg)["model"], expected)
    head = whole.model.student.head
    assert (share == 1.0) == all(p.grad is None for p in head.cls_score.parameters())


def test_json_lists_some_of_a_folder(tmp_path: Path, folder: str) -> None:
    images = [{"id": 7, "file_name": "3.png", "width": 64, "height": 64}]
    (tmp_path / "x.json").write_text(json.dumps({"images": images, "categories": []}))
    entry = {"IMAGES": folder, "JSON": str(tmp_path / "x.json")}
    cfg = mixed_config(tmp_path, folder, DISTILL__UNLABELLED__SETS=[entry])
    assert {x[0] for b in stream(cfg, 0, 2) for x in b[2:]} == {str(Path(folder) / "3.png")}


def test_images_of_a_test_set_are_told(
    tmp_path: Path, folder: str, forget_sets: None, caplog: pytest.LogCaptureFixture
) -> None:
    """What the teacher detects on them is learnt as labels would be."""
    write_set(tmp_path, "tested")
    (tmp_path / "link").symlink_to("tested")
    cfg = mixed_config(tmp_path, folder)
    for other, count in ((folder, 0), (str(tmp_path / "link"), 8)):
        caplog.clear()
        cfg.DISTILL.UNLABELLED.SETS = [folder, other]
        find_unlabelled(name_sets(cfg.clone(), tmp_path, [], ["tested"]))
        told = f"{count} of the 8 images of DATASETS.TEST are also in DISTILL.UNLABELLED.SETS"
        assert (told in caplog.text) == (count > 0)


def labelled_json(folder: str) -> Dict[str, str]:
    path = Path(folder).parent / "labels.json"
    images = [{"id": 7, "file_name": "3.png", "width": 64, "height": 64}]
    path.write_text(json.dumps({"images": images, "annotations": [{"id": 1}], "categories": []}))
    return {"IMAGES": folder, "JSON": str(path)}


@pytest.mark.parametrize(
    "entry, expected",
    [
        (lambda x: x + "_gone", r"SETS\[0\] IMAGES: there is no folder"),
        (lambda x: {"FOLDER": x}, r"SETS\[0\] must be a folder or \{IMAGES: folder, JSON: file\}"),
        (lambda x: 3, r"SETS\[0\] must be a folder"),
        (labelled_json, r"SETS\[0\]: .*labels.json has 1 annotations, which nobody would read"),
    ],
)
def test_bad_sets_are_refused(entry: Any, expected: str, tmp_path: Path, folder: str) -> None:
    cfg = mixed_config(tmp_path, folder, DISTILL__UNLABELLED__SETS=[entry(folder)])
    with pytest.raises((ValueError, OSError), match=f"DISTILL.UNLABELLED.{expected}"):
        stream(cfg, 0, 1)


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({"SHARE": 0.01}, r"SHARE 0.01 of SOLVER.IMS_PER_BATCH 4 leaves 4 labelled and 0 unlab"),
        ({"SHARE": 0.9}, r"SHARE 0.9 of .* leaves 0 labelled and 4 unlabelled"),
        ({"SHARE": 1.5}, r"SHARE must be in \[0, 1\], got 1.5"),
        ({"BOX_SCORE": 2.0}, r"BOX_SCORE must be in \[0, 1\], got 2.0"),
    ],
)
def test_bad_shares_are_refused_before_anything_is_built(
    keys: Any, expected: str, tmp_path: Path, folder: str
) -> None:
    own = {f"DISTILL__UNLABELLED__{k}": v for k, v in keys.items()}
    with pytest.raises(ValueError, match=f"DISTILL.UNLABELLED.{expected}"):
        check_config(mixed_config(tmp_path, folder, **own))


def test_student_alone_needs_labels(tmp_path: Path, folder: str) -> None:
    keys = {"DISTILL__UNLABELLED__SHARE": 1.0, "DISTILL__ENABLED": False}
    with pytest.raises(ValueError, match="no labelled image is left for a student alone"):
        batch_sizes(mixed_config(tmp_path, folder, **keys))


def test_both_parts_are_spread_over_all_processes(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    cfg = mixed_config(tmp_path, folder, DISTILL__UNLABELLED__SHARE=0.25)
    with pytest.raises(ValueError, match="3 labelled and 1 unlabelled images; both must be mult"):
        batch_sizes(cfg)


# Two processes ------------------------------------------------------------------------------------


def test_two_processes_share_the_images_of_one(
    tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = mixed_config(tmp_path, folder)
    one = stream(cfg, 0, 3)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    halves = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        halves.append(stream(cfg, 0, 3))
    for whole, first, second in zip(one, *halves):
        assert [x[1] for x in first] == [x[1] for x in second] == [True, False]
        assert sorted(first + second) == sorted(whole)


@pytest.mark.process
@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_two_processes_without_labels_train_as_one(tmp_path: Path, folder: str) -> None:
    # Norms without batch statistics, and CWD, whose loss is a mean over images: then the mean of
    # both processes' gradients is that of the whole batch. Parameters that only the student's own
    # losses use have no gradient in either.
    keys = {
        **GROUP_NORM,
        "DISTILL__UNLABELLED__SETS": [folder],
        "DISTILL__UNLABELLED__SHARE": 1.0,
        "MODEL__RETINANET__NORM": "",
        "SOLVER__IMS_PER_BATCH": 4,
        "SOLVER__MAX_ITER": 2,
        "SOLVER__STEPS": (),
    }
    opts = write_teacher(tmp_path, "retinanet", **GROUP_NORM)
    cfg = run_config(tmp_path, opts, ["CWD"], **keys)
    assert_two_train_as_one(cfg)
