"""Heads on class logits between detectors of other classes, through the real Distiller."""

from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Sequence, Tuple

import pytest
import torch
from torch import Tensor, nn

from detectron2.modeling import build_model
from detectron2.structures import pairwise_iou
from detectron2.utils.events import EventStorage

from d2kd import DISTILL_HEAD_REGISTRY
from d2kd.conformance.detectors import enliven
from d2kd.data.outlines import CLASSES
from d2kd.heads.registry import compares_logits, head_class, head_names
from tests.helpers.logit_references import dkd, log_sum_exp, refusal_of
from tests.helpers.toys import batch, detector_config, distill_config, write_teacher

SHAPES = list(CLASSES)  # disc, ring, triangle, square, star, cross: what every student knows
K = len(SHAPES)
NAMES = [*SHAPES, "dog", "cat"]  # what the base teachers know, of which others are made
# All that compare class logits, side by side: what one does is told by its own losses.
HEADS = {
    "retinanet": ["BCKD", "CrossKD", "DIST", "MLD"],
    "faster_rcnn": ["DIST", "DKD", "MLD", "RoICls", "RoILoc"],
}
each_family = pytest.mark.parametrize("family", HEADS)
VALUES = {
    "DATASETS__TRAIN": ("d2kd_shapes_train",),
    "MODEL__RETINANET__NUM_CLASSES": K,
    "MODEL__ROI_HEADS__NUM_CLASSES": K,
    "DISTILL__CrossKD__DEPTH": 1,  # of the one convolution that toys have
}
Step = Tuple[Dict[str, Tensor], Dict[str, Tensor]]


# Teachers of any classes -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(folder: Path) -> Callable[[str], Dict[str, Tensor]]:
    """The weights of a teacher of all NAMES by family, one that tells classes apart."""

    @lru_cache(maxsize=None)
    def weights(family: str) -> Dict[str, Tensor]:
        opts = write_teacher(folder, family, **classes_of(len(NAMES)))
        model = build_model(detector_config(family, **classes_of(len(NAMES))))
        model.load_state_dict(torch.load(opts[3])["model"])
        torch.manual_seed(2)
        enliven(model)
        if family == "faster_rcnn":
            nn.init.normal_(model.roi_heads.box_predictor.bbox_pred.weight, std=0.1)
        return model.state_dict()

    return weights


def classes_of(count: int) -> Dict[str, int]:
    return {"MODEL__RETINANET__NUM_CLASSES": count, "MODEL__ROI_HEADS__NUM_CLASSES": count}


@pytest.fixture(scope="module")
def teacher_of(base: Callable[[str], Dict[str, Tensor]], folder: Path) -> Callable[..., List[Any]]:
    """DISTILL.TEACHER.* of a teacher with the rows of these classes alone, in this order."""

    @lru_cache(maxsize=None)
    def options(family: str, *names: str) -> List[Any]:
        own = folder / f"{family}_{'_'.join(names)}"
        own.mkdir()
        (own / "teacher.yaml").write_text(detector_config(family, **classes_of(len(names))).dump())
        rows = [NAMES.index(x) for x in names]
        state = {k: chosen_rows(k, v, rows) for k, v in base(family).items()}
        torch.save({"model": state}, own / "teacher.pth")
        values = {
            "CONFIG_FILE": str(own / "teacher.yaml"),
            "WEIGHTS": str(own / "teacher.pth"),
            "CLASSES": list(names),
        }
        return [word for k, v in values.items() for word in (f"DISTILL.TEACHER.{k}", v)]

    return options


def chosen_rows(key: str, value: Tensor, rows: List[int]) -> Tensor:
    """A layer with rows for each class, of some classes; background is kept."""
    if "head.cls_score" in key:  # dense: A * K rows
        return value.unflatten(0, (-1, len(NAMES)))[:, rows].flatten(0, 1)
    if "box_predictor.cls_score" in key:
        return value[[*rows, len(NAMES)]]
    if "box_predictor.bbox_pred" in key:
        return value.unflatten(0, (len(NAMES), 4))[rows].flatten(0, 1)
    return value


def build(family: str, opts: List[Any], heads: Sequence[str] = (), **values: Any) -> nn.Module:
    cfg = distill_config(family, opts, heads or HEADS[family], **{**VALUES, **values})
    torch.manual_seed(0)
    distiller = build_model(cfg).train()
    torch.manual_seed(0)  # the teacher has drawn a number for each of its weights
    enliven(distiller.student)
    return distiller


def inputs_of(*classes: int, boxes: int = 2) -> List[Dict[str, Any]]:
    """Two images with objects of these classes in turn; of all of the student's by default."""
    inputs = batch(boxes=boxes)
    found = torch.tensor(classes or range(K)).repeat(boxes * len(inputs))
    for i, x in enumerate(inputs):
        x["instances"].gt_classes = found[i * boxes : (i + 1) * boxes].clone()
    return inputs


def forward(distiller: nn.Module, inputs: List[Dict[str, Any]]) -> Dict[str, Tensor]:
    torch.manual_seed(1)  # which proposals are sampled
    with EventStorage():
        return distiller(inputs)


def losses_of(distiller: nn.Module, inputs: List[Dict[str, Any]]) -> Dict[str, Dict[str, Tensor]]:
    """By head, those of the student alone left out."""
    losses = forward(distiller, inputs)
    return {k: {x: losses[x] for x in v} for k, v in distiller.last_step.terms.items()}


def step(
    distiller: nn.Module, inputs: List[Dict[str, Any]], silent: Sequence[str] = ()
) -> Dict[str, Step]:
    """
    Each head's losses and their gradients of the student, by parameter.

    Args:
        silent: heads whose gradients are all 0
    """
    params, found = dict(distiller.student.named_parameters()), {}
    for head, losses in losses_of(distiller, inputs).items():
        assert all(x.isfinite() for x in losses.values()), head
        total = sum(losses.values())
        grads = torch.autograd.grad(total, params.values(), retain_graph=True, allow_unused=True)
        own = {k: v for k, v in zip(params, grads) if v is not None}
        assert len(own) > 50 and all(v.isfinite().all() for v in own.values()), head
        assert any(v.any() for v in own.values()) == (head not in silent), head
        found[head] = {k: v.detach() for k, v in losses.items()}, own
    return found


def assert_same_steps(actual: Dict[str, Step], expected: Dict[str, Step], family: str) -> None:
    """Losses and gradients of every head agree to rounding."""
    assert list(actual) == list(expected) == HEADS[family]
    for head, pair in expected.items():
        for found, wanted in zip(actual[head], pair):
            assert list(found) == list(wanted)
            # CrossKD standardises levels of a cell or two: what is left of their gradient is noise.
            whole = max(x.norm().item() for x in wanted.values())
            for key, value in wanted.items():
                error = (found[key] - value).norm().item()
                limit = 1e-3 * value.norm().item() + 1e-5 * whole
                assert error <= limit, f"{head}: {key} by {error}, more than {limit}"


def class_rows(family: str, grads: Mapping[str, Tensor], key: str = "cls_score.weight") -> Tensor:
    """(K, ...): a layer's rows of each of the student's classes."""
    ((grad),) = [v for k, v in grads.items() if k.endswith(key)]
    if family == "retinanet":
        return grad.unflatten(0, (-1, K)).transpose(0, 1)
    return grad[:-1] if "cls_score" in key else grad.unflatten(0, (K, 4))


# What does not matter ----------------------------------------------------------------------------


def test_these_are_all_heads_on_class_logits() -> None:
    names = {x for x in head_names() if compares_logits(head_class(x))}
    # Of masks: tests/heads/test_roi_mask.py
    assert names == {"RoIMask", *(x for heads in HEADS.values() for x in heads)}


@pytest.fixture(scope="module")
def alike(teacher_of: Callable[..., List[Any]]) -> Callable[[str], Dict[str, Step]]:
    """What a teacher of the student's very classes does, by family."""

    @lru_cache(maxsize=None)
    def steps(family: str) -> Dict[str, Step]:
        distiller = build(family, teacher_of(family, *SHAPES))
        assert distiller.pair.same_classes and not distiller.lessons[0].merges
        return step(distiller, inputs_of())

    return steps


@each_family
def test_order_of_the_teacher_s_classes_does_not_matter(
    family: str, teacher_of: Callable[..., List[Any]], alike: Callable[[str], Dict[str, Step]]
) -> None:
    order = ["star", "disc", "cross", "ring", "square", "triangle"]
    distiller = build(family, teacher_of(family, *order))
    assert not distiller.pair.same_classes and len(distiller.lessons[0].merges) == 2
    assert_same_steps(step(distiller, inputs_of()), alike(family), family)


def test_other_classes_of_a_dense_teacher_change_nothing(
    teacher_of: Callable[..., List[Any]], alike: Callable[[str], Dict[str, Step]]
) -> None:
    distiller = build("retinanet", teacher_of("retinanet", "cat", *SHAPES, "dog"))
    assert_same_steps(step(distiller, inputs_of()), alike("retinanet"), "retinanet")


def test_other_classes_of_a_two_stage_teacher_are_background(
    teacher_of: Callable[..., List[Any]], alike: Callable[[str], Dict[str, Step]]
) -> None:
    # The one by hand: log(e^background + e^cat + e^dog) in place of its background.
    distiller = build("faster_rcnn", teacher_of("faster_rcnn", "cat", *SHAPES, "dog"))
    by_hand = build("faster_rcnn", teacher_of("faster_rcnn", *SHAPES))
    whole = distiller.teacher.model.roi_heads.box_predictor.cls_score

    def answer(module: nn.Module, inputs: Any, output: Any) -> Any:
        rows = whole(inputs[0]).double().tolist()
        merged = [[*z[1:7], log_sum_exp([z[0], z[7], z[8]])] for z in rows]
        return torch.tensor(merged).to(output[0]), output[1]

    by_hand.teacher.model.roi_heads.box_predictor.register_forward_hook(answer)
    expected = step(by_hand, inputs_of())
    assert_same_steps(step(distiller, inputs_of()), expected, "faster_rcnn")
    plain = alike("faster_rcnn")
    for head in HEADS["faster_rcnn"]:  # they do matter
        pairs = zip(plain[head][0].values(), expected[head][0].values())
        assert any(abs(x - y) > 1e-3 * y for x, y in pairs), head


@each_family
def test_aliased_names_are_as_good_as_equal_ones(
    family: str, teacher_of: Callable[..., List[Any]]
) -> None:
    opts = list(teacher_of(family, "star", "disc", "ring"))
    expected = step(build(family, opts), inputs_of())
    opts[5] = ["estrella", "disco", "anillo"]
    aliases = [["ring", "anillo"], ["star", "estrella"], ["disc", "disco"]]
    found = build(family, opts, DISTILL__TEACHER__ALIASES=aliases)
    assert_same_steps(step(found, inputs_of()), expected, family)


# Classes that the student alone knows ------------------------------------------------------------

COMMON = ["star", "disc", "triangle"]  # the student's 4, 0 and 2
ALONE = [1, 3, 5]


def test_class_that_a_dense_teacher_lacks_gets_no_gradient(
    teacher_of: Callable[..., List[Any]],
) -> None:
    distiller = build("retinanet", teacher_of("retinanet", *COMMON))
    for head, (_, grads) in step(distiller, inputs_of()).items():
        if head == "CrossKD":  # the student's predictors take no part
            assert not any("cls_score" in k for k in grads)
            continue
        rows = class_rows("retinanet", grads)
        assert not rows[ALONE].any(), head
        assert all(rows[i].any() for i in (0, 2, 4)), head


def test_class_that_a_two_stage_teacher_lacks_is_pushed_as_background_is(
    teacher_of: Callable[..., List[Any]],
) -> None:
    # Background b = log(sum over the rest of e^z): d loss / d z_i = (d loss / d b) e^z_i / e^b.
    distiller = build("faster_rcnn", teacher_of("faster_rcnn", *COMMON))
    losses = losses_of(distiller, inputs_of())
    raw = distiller.last_step.student.roi_predictions()
    (grad,) = torch.autograd.grad(losses.pop("RoILoc")["loss_roiloc"], [raw.deltas])
    by_class = grad.unflatten(1, (K, 4))
    assert not by_class[:, ALONE].any() and all(by_class[:, i].any() for i in (0, 2, 4))
    rest = [*ALONE, K]
    share = raw.logits.detach().double()[:, rest].softmax(1)
    for head, own in losses.items():
        (grad,) = torch.autograd.grad(sum(own.values()), [raw.logits], retain_graph=True)
        expected = grad[:, rest].double().sum(1, keepdim=True) * share
        assert (grad[:, rest] - expected).norm() < 1e-4 * expected.norm(), head
        assert all(grad[:, i].any() for i in range(K + 1)), head


def true_classes(view: Any, groups: Mapping[int, int]) -> List[int]:
    """The common class of the object that a region overlaps by half or more; else background."""
    labels = []
    for boxes, objects in zip(view.regions().boxes, view.gt_instances):
        for row in pairwise_iou(boxes, objects.gt_boxes):
            best = int(row.argmax())
            own = int(objects.gt_classes[best]) if row[best] >= 0.5 else -1
            labels.append(groups.get(own, len(groups)))
    return labels


def merged_rows(logits: Tensor, chosen: List[int]) -> Tensor:
    """(R, classes + 1) -> (R, len(chosen) + 1), background having everything else."""
    rest = [i for i in range(logits.shape[1]) if i not in chosen]
    rows = [[*(z[i] for i in chosen), log_sum_exp([z[i] for i in rest])] for z in logits.tolist()]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("objects", [[1], [0, 1]], ids=["student's alone", "both"])
def test_object_of_a_class_that_the_student_alone_knows_is_background_to_dkd(
    objects: List[int], teacher_of: Callable[..., List[Any]]
) -> None:
    distiller = build("faster_rcnn", teacher_of("faster_rcnn", *COMMON), ["DKD"])
    losses = losses_of(distiller, inputs_of(*objects))["DKD"]
    ours, theirs = distiller.last_step.student, distiller.last_step.teacher
    labels = true_classes(ours, {0: 0, 2: 1, 4: 2})  # in the student's order
    assert set(labels) == ({3} if objects == [1] else {0, 3})
    logits = (
        merged_rows(ours.roi_predictions().logits.double(), [0, 2, 4]),
        merged_rows(theirs.roi_predictions(ours.regions().boxes).logits.double(), [1, 2, 0]),
    )
    target, others = dkd(*logits, labels)
    assert [x.item() for x in losses.values()] == pytest.approx([target, others / 4], rel=1e-3)
    assert min(target, others) > 1e-3
    assert {int(x) for y in ours.sampled_proposals for x in y.gt_classes} == {*objects, K}


def test_object_of_a_class_that_the_student_alone_knows_is_no_positive(
    teacher_of: Callable[..., List[Any]],
) -> None:
    # CrossKD is a sum over anchors, divided by the number of those on objects, at least 1 of each
    # image; of BCKD's levels, those count that have some.
    opts, found = teacher_of("retinanet", *COMMON), []
    for classes in ([0], [1]):
        distiller = build("retinanet", opts, ["BCKD", "CrossKD"])
        inputs = inputs_of(*classes)
        found.append(forward(distiller, inputs))
        positives = distiller.last_step.student.anchor_labels().mean_positives.item()
    of_common, of_own = (x["loss_crosskd_cls"].item() for x in found)
    assert positives > len(inputs)
    assert of_own == pytest.approx(positives / len(inputs) * of_common, rel=1e-4)
    assert [x["loss_bckd_cls"].item() > 0 for x in found] == [True, False]


@each_family
def test_one_common_class_is_enough(family: str, teacher_of: Callable[..., List[Any]]) -> None:
    distiller = build(family, teacher_of(family, "star", "dog"))
    assert list(step(distiller, inputs_of(0, 4))) == HEADS[family]


@each_family
def test_joined_classes_train_each_of_theirs(
    family: str, teacher_of: Callable[..., List[Any]]
) -> None:
    # disc and ring of the student are one class with cat and dog of the teacher's; star is another.
    aliases = [["disc", "dog"], ["ring", "dog"], ["ring", "cat"]]
    opts = teacher_of(family, "star", "cat", "dog")
    distiller = build(family, opts, DISTILL__TEACHER__ALIASES=aliases)
    assert distiller.pair.classes.student == ((0, 1), (4,))
    assert distiller.pair.classes.teacher == ((1, 2), (0,))
    for head, (_, grads) in step(distiller, inputs_of()).items():
        if head != "CrossKD":
            key = "bbox_pred.weight" if head == "RoILoc" else "cls_score.weight"
            rows = class_rows(family, grads, key)
            assert all(rows[i].any() for i in (0, 1, 4)), head


# Other heads -------------------------------------------------------------------------------------


@each_family
def test_head_on_features_beside_one_on_logits_sees_no_map(
    family: str, teacher_of: Callable[..., List[Any]]
) -> None:
    inputs, opts = inputs_of(), teacher_of(family, *COMMON)
    both = build(family, opts, ["DIST", "PKD"])
    alone = build(family, teacher_of(family, *SHAPES), ["PKD"])
    found, expected = forward(both, inputs), forward(alone, inputs)
    assert torch.equal(found["loss_pkd"], expected["loss_pkd"]) and found["loss_pkd"] > 0
    assert {"loss_dist_inter", "loss_dist_intra"} <= set(found)
    own = set(found) - {"loss_dist_inter", "loss_dist_intra"}
    assert own == set(expected) and all(torch.equal(found[k], expected[k]) for k in own)


class Curious(nn.Module):
    """Keeps what it was given."""

    requires = frozenset({"dense", "anchor_labels"})

    def __init__(self, cfg: Any, pair: Any):
        super().__init__()
        self.pair = pair

    @staticmethod
    def add_config(node: Any) -> None:
        node.LOSS_WEIGHT = 1.0

    @classmethod
    def from_config(cls, cfg: Any, pair: Any) -> Dict[str, Any]:
        return {}

    def forward(self, student: Any, teacher: Any) -> Dict[str, Tensor]:
        self.views = student, teacher
        return {self.name: student.dense().logits[0].sum() * 0}


@pytest.fixture
def curious() -> Iterator[None]:
    """Two heads of a user's: CuriousLogits compares logits, CuriousFeatures does not."""
    added = {
        "CuriousLogitsHead": {"requires_logits": True, "name": "loss_a"},
        "CuriousFeaturesHead": {"name": "loss_b"},
    }
    for name, members in added.items():
        DISTILL_HEAD_REGISTRY._obj_map[name] = type(name, (Curious,), members)
    yield
    for name in added:
        DISTILL_HEAD_REGISTRY._obj_map.pop(name)


def test_user_s_head_that_compares_logits_gets_all_in_the_common_classes(
    curious: None, teacher_of: Callable[..., List[Any]]
) -> None:
    # The teacher's 0 (star) is the student's 4 and the common 2, and so on.
    opts = teacher_of("retinanet", "star", "dog", "disc", "triangle")
    distiller = build("retinanet", opts, ["CuriousLogits", "CuriousFeatures"])
    heads = distiller.heads
    forward(distiller, inputs_of(0, 1, 2, 4))
    pair, raw_pair = (heads[x].pair for x in ("CuriousLogits", "CuriousFeatures"))
    assert (pair.student.num_classes, pair.teacher.num_classes) == (3, 3)
    assert (raw_pair.student.num_classes, raw_pair.teacher.num_classes) == (K, 4)
    views, raw = heads["CuriousLogits"].views, heads["CuriousFeatures"].views
    assert raw == (distiller.last_step.student, distiller.last_step.teacher)
    for view, own, rows in zip(views, raw, ([0, 2, 4], [2, 3, 0])):
        assert view.num_classes == 3 and view.features is own.features
        for merged, logits in zip(view.dense().logits, own.dense().logits):
            by_class = logits.unflatten(1, (view.num_anchors, -1))
            assert torch.equal(merged, by_class[:, :, rows].flatten(1, 2))
        # Both have the ground truth of the data, which the student learns.
        assert [x.gt_classes.tolist() for x in view.gt_instances] == [[0, 3], [1, 2]]
        assert [x.gt_classes.tolist() for x in own.gt_instances] == [[0, 1], [2, 4]]
    labels, own_labels = (x[0].anchor_labels() for x in (views, raw))
    assert (labels.num_classes, own_labels.num_classes) == (3, K)
    new = {0: 0, 1: 3, 2: 1, 3: 3, 4: 2, 5: 3, K: 3, -1: -1}
    seen = set()
    for merged, own in zip(labels.maps, own_labels.maps):
        assert merged.flatten().tolist() == [new[x] for x in own.flatten().tolist()]
        seen |= set(own.flatten().tolist())
    assert {0, 1, 4, K} <= seen


def test_without_a_map_every_head_has_the_views_themselves(
    curious: None, teacher_of: Callable[..., List[Any]]
) -> None:
    distiller = build("retinanet", teacher_of("retinanet", *SHAPES), ["CuriousLogits"])
    forward(distiller, inputs_of())
    step = distiller.last_step
    assert distiller.heads["CuriousLogits"].views == (step.student, step.teacher)


# Refusals ----------------------------------------------------------------------------------------


@each_family
def test_nothing_in_common_refuses_these_heads_and_names_those_that_fit(
    family: str, teacher_of: Callable[..., List[Any]]
) -> None:
    opts = teacher_of(family, "dog", "cat")
    values = {"DISTILL__TEACHER__ALLOW_OTHER_CLASSES": True}
    distiller = build(family, opts, ["PKD"], **values)
    assert not distiller.lessons[0].merges and forward(distiller, inputs_of())["loss_pkd"] > 0
    cfg = distill_config(family, opts, ["PKD"], **{**VALUES, **values})
    for head in HEADS[family]:
        text = refusal_of(head, cfg, distiller.pair)
        reason = f"{head} compares class logits, but the detectors have no class in common."
        assert text.startswith(f"DISTILL.HEADS: {reason} Heads that fit: ") and "PKD" in text


def test_unknown_names_of_unequal_numbers_refuse_the_head_and_say_where_to_give_them(
    teacher_of: Callable[..., List[Any]],
) -> None:
    opts = teacher_of("retinanet", "star", "disc")[:4]
    distiller = build("retinanet", opts, ["PKD"])
    cfg = distill_config("retinanet", opts, ["DIST"], **VALUES)
    text = refusal_of("DIST", cfg, distiller.pair)
    assert "the student has 6 classes and the teacher 2" in text
    assert "Name the teacher's in DISTILL.TEACHER.CLASSES" in text


# Little to compare -------------------------------------------------------------------------------


@each_family
def test_images_without_objects_are_compared(
    family: str, teacher_of: Callable[..., List[Any]]
) -> None:
    distiller = build(family, teacher_of(family, *COMMON))
    assert list(step(distiller, inputs_of(boxes=0), silent=["BCKD"])) == HEADS[family]


@each_family
def test_bfloat16_autocast_gives_finite_float32_losses(
    family: str, teacher_of: Callable[..., List[Any]]
) -> None:
    distiller = build(family, teacher_of(family, *COMMON))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = losses_of(distiller, inputs_of())
    assert list(found) == HEADS[family]
    for loss in (x for losses in found.values() for x in losses.values()):
        assert loss.isfinite() and loss.dtype == torch.float32 and loss.requires_grad


def test_heads_that_are_off_ask_nobody(teacher_of: Callable[..., List[Any]]) -> None:
    values = {f"DISTILL__{x}__SCHEDULE__STOP_ITER": 1 for x in HEADS["faster_rcnn"]}
    distiller = build("faster_rcnn", teacher_of("faster_rcnn", *COMMON), **values)
    backbone = distiller.teacher.model.backbone
    backbone.register_forward_hook(lambda *_: pytest.fail("the teacher was asked"))
    with EventStorage(1):
        losses = distiller(inputs_of())
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}


def test_map_is_in_no_checkpoint_and_moves_with_the_distiller(
    teacher_of: Callable[..., List[Any]],
) -> None:
    distiller = build("retinanet", teacher_of("retinanet", *COMMON), ["DIST"])
    assert not any("merges" in k for k in distiller.state_dict())
    assert len(list(distiller.lessons[0].merges.buffers())) == 8
    assert all(x.device.type == "meta" for x in distiller.to("meta").lessons[0].merges.buffers())
