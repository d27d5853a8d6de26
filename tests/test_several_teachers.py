"""DISTILL.TEACHERS: several teachers at once, each as if it were the only one."""

import shutil
import weakref
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import pytest
import torch
from PIL import Image
from torch import nn

from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage

from d2kd.conformance.detectors import classifier, enliven
from d2kd.data.outlines import CLASSES
from d2kd.doctor import examine
from d2kd.engine.facts import read_facts
from d2kd.engine.preflight.check_config import check_config
from d2kd.engine.preflight.summary import summary
from d2kd.labelling.detector import load_detector
from d2kd.panel import draw_panel
from d2kd.report.distillation import teacher as teachers_in_report
from d2kd.report.run import Run
from d2kd.teacher.stand_in import confident
from tests.helpers.runs import (
    assert_same_checkpoint,
    assert_two_train_as_one,
    build_trainer,
    interrupt,
    run,
    run_config,
    saved,
)
from tests.helpers.toys import GROUP_NORM, batch, distill_config, write_teacher

SHAPES = list(CLASSES)  # of the student: disc, ring, triangle, square, star, cross
K = len(SHAPES)
VALUES = {
    "DATASETS__TRAIN": ("d2kd_shapes_train",),
    "MODEL__RETINANET__NUM_CLASSES": K,
    "MODEL__ROI_HEADS__NUM_CLASSES": K,
    **GROUP_NORM,
}
HALVES = {"left": SHAPES[:3], "right": SHAPES[3:]}
FAMILIES = {"retinanet": ["PKD", "MLD", "DIST"], "faster_rcnn": ["PKD", "DKD", "RoILoc"]}
each_family = pytest.mark.parametrize("family", FAMILIES)
Entry = Dict[str, Any]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Entry]:
    """DISTILL.TEACHER of a toy detector of the student's classes, by family and name."""
    folder = tmp_path_factory.mktemp("teachers")
    made: Dict[Any, Entry] = {}

    def find(family: str, name: str) -> Entry:
        if (family, name) not in made:
            own = folder / family / name
            own.mkdir(parents=True)
            opts = write_teacher(own, family, seed=7 + len(made), **VALUES)
            found = {"CONFIG_FILE": opts[1], "WEIGHTS": opts[3], "CLASSES": SHAPES}
            model = torch.load(opts[3])
            cfg = distill_config(family, opts, **VALUES)
            cfg.MODEL.META_ARCHITECTURE = cfg.DISTILL.STUDENT_META_ARCHITECTURE
            detector = build_model(cfg)
            detector.load_state_dict(model["model"])
            enliven(detector)
            torch.save({"model": detector.state_dict()}, opts[3])
            made[family, name] = found
        return made[family, name]

    return find


@pytest.fixture
def two(weights: Callable[[str, str], Entry]) -> Callable[..., List[Entry]]:
    """DISTILL.TEACHERS: `left` for the first three classes, `right` for the others."""

    def entries(family: str = "retinanet", **keys: Any) -> List[Entry]:
        return [
            {"NAME": x, "TEACHER": {**weights(family, x), "FOR_CLASSES": classes}, **keys}
            for x, classes in HALVES.items()
        ]

    return entries


def build(family: str, heads: Sequence[str], **values: Any) -> nn.Module:
    cfg = distill_config(family, [], heads, **{**VALUES, **values})
    torch.manual_seed(0)
    distiller = build_model(cfg).train()
    torch.manual_seed(0)  # a teacher has drawn a number for each of its weights
    enliven(distiller.student)
    return distiller


def alone(family: str, heads: Sequence[str], entry: Entry, **values: Any) -> nn.Module:
    keys = {f"DISTILL__TEACHER__{k}": v for k, v in entry["TEACHER"].items()}
    return build(family, heads, **keys, **values)


def inputs_of() -> List[Dict[str, Any]]:
    """Two images in which each class has an object."""
    inputs = batch(boxes=K)
    for x in inputs:
        x["instances"].gt_classes = torch.arange(K)
    return inputs


def losses_of(distiller: nn.Module, inputs: List[Dict[str, Any]]) -> Dict[str, Any]:
    torch.manual_seed(1)  # which proposals are sampled
    with EventStorage():
        return distiller(inputs)


# Each as if it were alone -------------------------------------------------------------------------


@each_family
def test_each_teaches_what_it_would_teach_alone(
    family: str, two: Callable[..., List[Entry]]
) -> None:
    entries = two(family)
    together = build(family, FAMILIES[family], DISTILL__TEACHERS=entries)
    together.heads.load_state_dict(  # adapters are drawn one after the other
        {
            f"{x['NAME']}/{k}": v
            for x in entries
            for k, v in alone(family, FAMILIES[family], x).heads.state_dict().items()
        }
    )
    losses = losses_of(together, inputs_of())
    for entry, lesson in zip(entries, together.lessons):
        one = losses_of(alone(family, FAMILIES[family], entry), inputs_of())
        for key, value in one.items():
            distilled = any(x.lower() in key for x in FAMILIES[family])
            found = losses.pop(lesson.loss_name(key)) if distilled else losses[key]
            torch.testing.assert_close(found, value)
            assert value > 0 or not distilled
    assert not any(x in key for key in losses for x in HALVES), "nothing but these"


@each_family
def test_one_entry_is_the_special_case_of_one_teacher(
    family: str, two: Callable[..., List[Entry]]
) -> None:
    entry = two(family)[0]
    heads = FAMILIES[family]
    one = losses_of(alone(family, heads, entry), inputs_of())
    listed = losses_of(build(family, heads, DISTILL__TEACHERS=[entry]), inputs_of())
    assert [x.replace("loss_left_", "loss_") for x in listed] == list(one)
    assert all(torch.equal(a, b) for a, b in zip(listed.values(), one.values()))


@pytest.mark.parametrize("head", ["MLD", "DIST", "BCKD"])
def test_each_teaches_its_classes_alone(head: str, two: Callable[..., List[Entry]]) -> None:
    # Sigmoids score each class by itself: the logits of the other classes have no gradient.
    distiller = build("retinanet", [head], DISTILL__TEACHERS=two())
    losses = losses_of(distiller, inputs_of())
    bias = classifier(distiller.student).bias
    for name, taught in (("left", slice(0, 3)), ("right", slice(3, K))):
        own = sum(v for k, v in losses.items() if k.startswith(f"loss_{name}_"))
        (gradient,) = torch.autograd.grad(own, bias, retain_graph=True)
        by_class = gradient.view(-1, K)
        assert by_class[:, taught].ne(0).all()
        by_class[:, taught] = 0
        assert not by_class.any()


def test_softmax_has_the_other_classes_as_background(two: Callable[..., List[Entry]]) -> None:
    # A class that the teacher is not for and background are one to it: of the student's, moving
    # probability from one to the other changes nothing.
    distiller = build("faster_rcnn", ["DKD"], DISTILL__TEACHERS=two("faster_rcnn"))
    losses_of(distiller, inputs_of())
    step, lesson = distiller.last_step, distiller.lessons[0]
    ours, _ = lesson.comparable(step.student, step.teachers[0])
    merged = ours.roi_predictions().logits.softmax(dim=1)
    plain = step.student.roi_predictions().logits.softmax(dim=1)
    torch.testing.assert_close(merged[:, :3], plain[:, :3])
    torch.testing.assert_close(merged[:, 3], plain[:, 3:].sum(dim=1))


def test_gradient_reaches_the_student_and_no_teacher(two: Callable[..., List[Entry]]) -> None:
    distiller = build("retinanet", ["PKD", "MLD"], DISTILL__TEACHERS=two())
    sum(losses_of(distiller, inputs_of()).values()).backward()
    assert all(p.grad is not None for p in distiller.student.head.parameters())
    for lesson in distiller.lessons:
        assert all(p.grad is None for p in lesson.teacher.model.parameters())
        assert not any(x.training for x in lesson.teacher.model.modules())
    assert not any("lessons" in key for key in distiller.state_dict())


def test_keys_of_an_entry_are_of_its_own_heads(two: Callable[..., List[Entry]]) -> None:
    left, right = two()
    left["OPTS"] = ["DISTILL.PKD.LOSS_WEIGHT", 0.5]
    right.update(HEADS=["MLD", "PKD"], OPTS=["DISTILL.PKD.SCHEDULE.STOP_ITER", 1])
    distiller = build("retinanet", ["PKD"], DISTILL__TEACHERS=[left, right])
    assert list(distiller.heads) == ["left/PKD", "right/MLD", "right/PKD"]
    weights = {k: x(1) for k, x in distiller.schedules.items()}
    assert weights["left/PKD"] == 0.5 and weights["right/PKD"] == 0.0


def test_keys_of_an_entry_build_its_heads_and_scale_their_losses(
    two: Callable[..., List[Entry]],
) -> None:
    left, right = two()
    left["OPTS"] = ["DISTILL.PKD.NUM_LEVELS", 2, "DISTILL.MGD.REFERENCE_PIXELS", 4096]
    right["OPTS"] = ["DISTILL.PKD.NUM_LEVELS", 3]
    distiller = build("retinanet", ["PKD", "MGD"], DISTILL__TEACHERS=[left, right])
    assert [len(distiller.heads[f"{x}/PKD"].levels) for x in HALVES] == [2, 3]
    assert [distiller.reference_pixels[f"{x}/MGD"] for x in HALVES] == [4096, 0]


def test_one_of_them_is_inherited_from(two: Callable[..., List[Entry]]) -> None:
    left, right = two()
    right["INHERIT"] = ["neck"]
    distiller = build("retinanet", ["PKD"], DISTILL__TEACHERS=[left, right])
    distiller.inherit_from_teacher()
    key = "backbone.fpn_output4.weight"
    ours, *theirs = (
        x.get_parameter(key)
        for x in (distiller.student, *(x.teacher.model for x in distiller.lessons))
    )
    assert torch.equal(ours, theirs[1]) and not torch.equal(ours, theirs[0])


# Time and memory ----------------------------------------------------------------------------------


def test_teachers_run_once_each_one_after_the_other_and_leave_what_is_read(
    two: Callable[..., List[Entry]],
) -> None:
    distiller = build("retinanet", ["PKD"], DISTILL__TEACHERS=two())
    inner: Dict[str, List[Any]] = {"left": [], "right": [], "student": []}
    alive: List[int] = []

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Dict[str, torch.Tensor]) -> None:
            inner[name] += [weakref.ref(x) for k, x in output.items() if k != "res5"]

        return hook

    def count(*args: Any) -> None:
        before = [x for name in ("left", "right") for x in inner[name]]
        alive.append(sum(x() is not None for x in before))

    detectors = {x.name: x.teacher.model for x in distiller.lessons}
    for name, detector in {**detectors, "student": distiller.student}.items():
        detector.backbone.bottom_up.register_forward_hook(keep(name))
        detector.backbone.bottom_up.register_forward_pre_hook(count)
    losses_of(distiller, inputs_of())
    assert {k: len(x) for k, x in inner.items()} == {"left": 2, "right": 2, "student": 2}
    # Of res5, P6 may still be asked for.
    assert alive == [0, 0, 0], "what one has passed through is freed before the next"


def test_teacher_whose_heads_are_off_does_not_run(two: Callable[..., List[Entry]]) -> None:
    distiller = build("retinanet", ["PKD"], DISTILL__TEACHERS=two())
    distiller.schedules["left/PKD"] = lambda iteration: 0.0
    calls: List[str] = []
    for lesson in distiller.lessons:
        name, backbone = lesson.name, lesson.teacher.model.backbone
        backbone.bottom_up.register_forward_hook(lambda *_, name=name: calls.append(name))
    losses_of(distiller, inputs_of())
    assert calls == ["right"]


def test_heads_that_are_off_have_the_name_of_their_teacher_and_a_gradient_of_0(
    two: Callable[..., List[Entry]],
) -> None:
    distiller = build("retinanet", ["MGD"], DISTILL__TEACHERS=two())
    names = set(losses_of(distiller, inputs_of()))
    distiller.schedules = dict.fromkeys(distiller.schedules, lambda iteration: 0.0)
    losses = losses_of(distiller, inputs_of())
    assert set(losses) == names
    assert losses["loss_left_mgd"] == losses["loss_right_mgd"] == 0
    sum(losses.values()).backward()
    assert all(not p.grad.any() for p in distiller.heads.parameters())


# Images without labels ----------------------------------------------------------------------------


def test_boxes_of_all_stand_in_each_for_its_classes(two: Callable[..., List[Entry]]) -> None:
    keys = {"DISTILL__UNLABELLED__SETS": ["a_folder"], "DISTILL__UNLABELLED__BOX_SCORE": 0.01}
    distiller = build("retinanet", ["FGD"], DISTILL__TEACHERS=two(), **keys)
    images = [{k: v for k, v in x.items() if k != "instances"} for x in inputs_of()]
    found = [
        confident(distiller.view_of_teacher(images, x).detections(), 0.01, x.pair.classes)
        for x in distiller.lessons
    ]
    for instances, taught in zip(found, ({0, 1, 2}, {3, 4, 5})):
        assert set(torch.cat([x.gt_classes for x in instances]).tolist()) <= taught
    assert all(sum(map(len, x)) > 2 for x in found)
    labelled = [{**x, "instances": Instances.cat(list(y))} for x, y in zip(images, zip(*found))]
    expected, losses = losses_of(distiller, labelled), losses_of(distiller, images)
    assert len(losses) > 2 and all("fgd" in key for key in losses)
    for key, loss in losses.items():
        torch.testing.assert_close(loss, expected[key])


# Runs ---------------------------------------------------------------------------------------------


def several(folder: Path, two: Callable[..., List[Entry]], **keys: Any) -> Any:
    values = {"DISTILL__TEACHERS": two(), "DISTILL__TEACHER__EVAL_IMAGES": 0, **GROUP_NORM, **keys}
    opts = write_teacher(folder, "retinanet")  # unused: each entry has its own
    return run_config(folder, opts, ["PKD", "MLD"], **values)


def test_run_resumes_exactly_and_tells_of_each(
    tmp_path: Path, two: Callable[..., List[Entry]], caplog: pytest.LogCaptureFixture
) -> None:
    cfg = several(tmp_path, two, VIS_PERIOD=2)
    with caplog.at_level("INFO"):
        run(cfg)
    text = caplog.text
    assert all(x in text for x in ("loss_left_pkd", "loss_right_mld", "LOSS_WEIGHT of right"))
    expected = saved(cfg)
    assert set(expected["teacher"]) == {
        f"{x}: {y}" for x in HALVES for y in ("config", "weights_sha256", "classes")
    }
    cfg.OUTPUT_DIR = str(tmp_path / "again")
    interrupt(cfg, 2)
    run(cfg, resume=True)
    assert_same_checkpoint(saved(cfg), expected)
    facts = [x for x in read_facts(cfg.OUTPUT_DIR) if x["kind"] == "distillation"]
    assert [x["teacher"] for x in facts[:2]] == list(HALVES)
    (tmp_path / "again" / "config.yaml").write_text(cfg.dump())
    section = teachers_in_report(Run(cfg.OUTPUT_DIR))
    assert [x.rows[0] for x in section.blocks] == [
        ["teacher", f"{x}, heads PKD, MLD"] for x in HALVES
    ]


def test_another_teacher_is_refused_on_resume(
    tmp_path: Path, two: Callable[..., List[Entry]], weights: Callable[[str, str], Entry]
) -> None:
    cfg = several(tmp_path, two)
    interrupt(cfg, 2)
    cfg.DISTILL.TEACHERS[1]["TEACHER"]["WEIGHTS"] = weights("retinanet", "other")["WEIGHTS"]
    with pytest.raises(ValueError, match="another teacher: right: weights_sha256 differs"):
        run(cfg, resume=True)


def test_teacher_that_has_moved_is_the_same_on_resume(
    tmp_path: Path, two: Callable[..., List[Entry]]
) -> None:
    cfg = several(tmp_path, two)
    interrupt(cfg, 2)
    node = cfg.DISTILL.TEACHERS[1]["TEACHER"]
    for key in ("CONFIG_FILE", "WEIGHTS"):
        node[key] = shutil.copy(node[key], tmp_path)
    assert build_trainer(cfg, resume=True).start_iter == 2
    node["FOR_CLASSES"] = SHAPES[4:]
    with pytest.raises(ValueError, match="another teacher: right: classes differs"):
        build_trainer(cfg, resume=True)
    cfg.DISTILL.TEACHERS[1].update(NAME="other", TEACHER={**node, "FOR_CLASSES": SHAPES[3:]})
    with pytest.raises(ValueError, match="another teacher: other: "):
        build_trainer(cfg, resume=True)


@pytest.mark.process
@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_two_processes_train_as_one(tmp_path: Path, two: Callable[..., List[Entry]]) -> None:
    # As in test_unlabelled, of which these images have no labels either.
    (tmp_path / "others").mkdir()
    for i, image in enumerate(inputs_of()):
        array = image["image"].permute(1, 2, 0).clamp(0, 255).byte().numpy()
        Image.fromarray(array).save(tmp_path / "others" / f"{i}.png")
    keys = {
        "DISTILL__UNLABELLED__SETS": [str(tmp_path / "others")],
        "DISTILL__UNLABELLED__SHARE": 1.0,
        "SOLVER__IMS_PER_BATCH": 4,
        "SOLVER__MAX_ITER": 2,
        "SOLVER__STEPS": (),
    }
    cfg = several(tmp_path, two, **keys)
    cfg.DISTILL.HEADS = ["CWD"]
    assert_two_train_as_one(cfg)


def test_summary_panel_and_doctor_show_each(
    tmp_path: Path, two: Callable[..., List[Entry]], capsys: pytest.CaptureFixture
) -> None:
    distiller = build("retinanet", ["PKD"], DISTILL__TEACHERS=two())
    text = summary(distiller)
    assert "teacher left" in text and "head right/PKD" in text
    assert "Teacher right\nLevels, student's <- teacher's:\n" in text
    assert "Classes, student's <- teacher's:\n  square <- square" in text
    assert "of both, but not taught: disc, ring, triangle" in text
    losses_of(distiller, inputs_of())
    both = draw_panel(distiller)
    single = alone("retinanet", ["PKD"], two()[0])
    losses_of(single, inputs_of())
    assert both.shape[0] > 1.4 * draw_panel(single).shape[0]
    examine(several(tmp_path, two), num_images=2)
    out = capsys.readouterr().out
    assert all(
        x in out for x in ("Heads with left", "Heads with right", "right: The teacher takes")
    )


# What is refused ----------------------------------------------------------------------------------


def wrong_name(entries: List[Entry]) -> None:
    entries[0]["NAME"] = "a/b"


def same_name(entries: List[Entry]) -> None:
    entries[1]["NAME"] = "Left"


def unknown_key(entries: List[Entry]) -> None:
    entries[1]["WEIGHTS"] = "x.pth"


def other_option(entries: List[Entry]) -> None:
    entries[0]["OPTS"] = ["SOLVER.BASE_LR", 0.1]


def no_weights(entries: List[Entry]) -> None:
    del entries[1]["TEACHER"]["WEIGHTS"]


def unknown_head(entries: List[Entry]) -> None:
    entries[1]["HEADS"] = ["PKKD"]


def inherits_twice(entries: List[Entry]) -> None:
    for entry in entries:
        entry["INHERIT"] = ["neck"]


def no_mapping(entries: List[Entry]) -> None:
    entries[0] = "a.yaml"


@pytest.mark.parametrize(
    "spoil, expected",
    [
        (wrong_name, r"DISTILL.TEACHERS\[0\]: NAME is 'a/b'"),
        (same_name, "DISTILL.TEACHERS has two entries with the NAME 'left'"),
        (unknown_key, r"DISTILL.TEACHERS\[1\]: The entry has unknown keys:\n  WEIGHTS"),
        (other_option, r"DISTILL.TEACHERS\[0\]: OPTS has SOLVER.BASE_LR"),
        (no_weights, "DISTILL.TEACHERS, right: DISTILL.TEACHER.WEIGHTS is empty"),
        (unknown_head, "DISTILL.TEACHERS, right: DISTILL.HEADS names the unknown head 'PKKD'"),
        (inherits_twice, "would inherit its neck from both left and right"),
        (no_mapping, r"DISTILL.TEACHERS\[0\]: must be a mapping"),
    ],
)
def test_bad_entries_are_refused_before_anything_is_built(
    spoil: Callable[[List[Entry]], None],
    expected: str,
    tmp_path: Path,
    two: Callable[..., List[Entry]],
) -> None:
    cfg = several(tmp_path, two)
    spoil(cfg.DISTILL.TEACHERS)
    with pytest.raises((ValueError, FileNotFoundError), match=expected):
        check_config(cfg)


def test_stages_and_teachers_exclude_each_other(
    tmp_path: Path, two: Callable[..., List[Entry]]
) -> None:
    cfg = several(tmp_path, two, DISTILL__STAGES=[{"ITERATIONS": 4}])
    with pytest.raises(ValueError, match="DISTILL.TEACHERS and DISTILL.STAGES are both set"):
        check_config(cfg)


@pytest.mark.parametrize("claims", [[SHAPES[:4], SHAPES[3:]], [[], SHAPES[3:]], [[], []]])
def test_class_claimed_by_two_is_refused_where_it_matters(
    claims: List[List[str]], two: Callable[..., List[Entry]]
) -> None:
    entries = two()
    for entry, classes in zip(entries, claims):
        entry["TEACHER"]["FOR_CLASSES"] = classes
    first = SHAPES[3] if claims[1] else SHAPES[0]
    with pytest.raises(ValueError, match=f"class '{first}' would be taught by both left and right"):
        build("retinanet", ["MLD"], DISTILL__TEACHERS=entries)
    losses = losses_of(build("retinanet", ["PKD"], DISTILL__TEACHERS=entries), inputs_of())
    assert losses["loss_left_pkd"] > 0 and losses["loss_right_pkd"] > 0


def test_two_that_detect_one_class_in_place_of_labels_are_told_that_features_do_not_excuse_them(
    tmp_path: Path, two: Callable[..., List[Entry]]
) -> None:
    entries = two()
    for entry in entries:
        entry["TEACHER"]["FOR_CLASSES"] = []
    values = {"SETS": [str(tmp_path)], "BOX_SCORE": 0.5}
    values = {f"DISTILL__UNLABELLED__{k}": v for k, v in values.items()}
    with pytest.raises(ValueError, match="taught by both left and right.*BOX_SCORE") as refused:
        build("retinanet", ["FGD"], DISTILL__TEACHERS=entries, **values)
    assert "need no such choice" not in str(refused.value)
    build("retinanet", ["PKD"], DISTILL__TEACHERS=entries, **values)  # it needs no boxes


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({"FOR_CLASSES": ["disk"]}, "FOR_CLASSES has 'disk'.* Did you mean 'disc'?"),
        ({"FOR_CLASSES": [3]}, "FOR_CLASSES has 3. It may list the student's classes"),
        (
            {"FOR_CLASSES": ["disc"], "ALIASES": [["disc", "disc"], ["ring", "disc"]]},
            "FOR_CLASSES has 'disc', but aliases make one class of disc, ring",
        ),
    ],
)
def test_bad_classes_are_refused(
    keys: Dict[str, Any], expected: str, two: Callable[..., List[Entry]]
) -> None:
    entries = two()
    entries[0]["TEACHER"].update(keys)
    with pytest.raises(ValueError, match=f"DISTILL.TEACHERS, left: DISTILL.TEACHER.{expected}"):
        build("retinanet", ["PKD"], DISTILL__TEACHERS=entries)


def test_labels_come_from_one_teacher(tmp_path: Path, two: Callable[..., List[Entry]]) -> None:
    with pytest.raises(ValueError, match="DISTILL.TEACHERS has 2 teachers, and --teacher labels"):
        load_detector(several(tmp_path, two), use_teacher=True)
