"""A view says what the detector's own modules say; the student's comes from its own pass."""

from typing import Any, Callable, Dict, List, Sequence, Tuple

import pytest
import torch
from torch import Tensor, nn

from detectron2.structures import Boxes

from d2kd import DetectorView
from d2kd.views import (
    RCNNView,
    Regions,
    RegionSampler,
    describe_detector,
    find_view,
    roi_align_levels,
)
from d2kd.views.layout import cells_inside
from tests.helpers.toys import batch
from tests.helpers.view_toys import (
    DENSE,
    OF_DENSE,
    OF_REGIONS,
    OF_TWO_STAGE,
    TWO_STAGE,
    build,
    build_teacher,
    c4_detector,
    masked_batch,
    needs_fcos,
    record,
    some_boxes,
    view_of_teacher,
)


def assert_same(actual: Any, expected: Any) -> None:
    """Equal bit for bit: tensors, or lists or dicts of them."""
    if isinstance(expected, Tensor):
        assert torch.equal(actual, expected)
        return
    assert len(actual) == len(expected)
    keys = expected if isinstance(expected, dict) else range(len(expected))
    for k in keys:
        assert torch.equal(actual[k], expected[k]), k


# The batch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn"])
def test_view_knows_sizes_strides_and_ground_truth(name: str) -> None:
    inputs = batch(height=40, width=50) + batch(num_images=1, boxes=0, height=33, width=60)
    view = record(build(name), inputs)
    assert view.image_sizes == [(40, 50), (40, 50), (33, 60)]
    assert view.image_size == (64, 64), "the largest height and width, then a multiple of 32"
    assert [len(x) for x in view.gt_instances] == [2, 2, 0]
    for level, stride in view.strides.items():
        assert stride == 2 ** int(level[1:])
        # Halved again and again, rounding up: a level is never empty.
        assert tuple(view.features[level].shape[-2:]) == (-(-64 // stride),) * 2


@pytest.mark.parametrize("name", [*DENSE, *TWO_STAGE])
def test_a_family_provides_its_members_and_knows_its_classes(name: str) -> None:
    detector = build(name)
    view = find_view(detector, "student")(detector)
    expected = OF_TWO_STAGE if name in TWO_STAGE else OF_DENSE | {"tower_1"}
    expected = expected | ({"mask_logits", "mask_features"} if name == "mask_rcnn" else set())
    assert view.provides == expected and view.num_classes == 3


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_detector_provides_each_convolution_of_its_towers(name: str) -> None:
    key = {"retinanet": "MODEL__RETINANET__NUM_CONVS", "fcos": "MODEL__FCOS__NUM_CONVS"}[name]
    detector = build(name, **{key: 3})
    provides = find_view(detector, "student")(detector).provides
    assert provides == OF_DENSE | {"tower_1", "tower_2", "tower_3"}


@pytest.mark.parametrize("ratios, per_size", [([[0.5, 1.0, 2.0]], 3), ([[1.0]], 1)])
@pytest.mark.parametrize("name", [*DENSE, *TWO_STAGE])
def test_anchors_per_cell_are_those_of_the_logits(
    name: str, ratios: List[List[float]], per_size: int
) -> None:
    detector = build_teacher(name, MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS=ratios)
    anchors = 1 if name == "fcos" else per_size
    view = view_of_teacher(detector, batch())
    assert view.num_anchors == anchors and view.two_stage == (name in TWO_STAGE)
    classes = 1 if view.two_stage else view.num_classes  # an RPN tells objects
    assert {x.shape[1] for x in view.dense().logits} == {anchors * classes}


def test_detector_without_an_rpn_has_no_dense_predictions() -> None:
    detector = build("faster_rcnn", MODEL__PROPOSAL_GENERATOR__NAME="PrecomputedProposals")
    view = find_view(detector, "student")(detector)
    assert view.provides == OF_REGIONS | {"features", "roi_predictions"}
    assert view.num_anchors == 0 and view.two_stage and view.info.dense_levels == ()


def test_detector_with_one_pooled_level_has_no_roi_predictions() -> None:
    detector = c4_detector()
    assert find_view(detector, "teacher")(detector).provides == {"features", "dense"}


@pytest.mark.parametrize("name", DENSE)
def test_info_of_a_dense_detector(name: str) -> None:
    info = describe_detector(build(name), "student")
    assert info.name == {"retinanet": "RetinaNet", "fcos": "FCOS"}[name]
    assert info.dense_levels == ("p3", "p4", "p5", "p6", "p7") == tuple(info.shapes)
    assert info.channels == 32
    assert info.vector_channels == 32, "of the tower, which keeps the pyramid's channels"
    assert info.roi_size == 7 and not info.two_stage
    assert info.num_anchors == (3 if name == "retinanet" else 1) and info.num_classes == 3
    assert info.box_weights == ((1.0, 1.0, 1.0, 1.0) if name == "retinanet" else ())
    # Of the finest level, around the corner of the image; FCOS's are as large as a cell, around
    # its centre.
    whole = {"retinanet": (-4.0, -4.0, 4.0, 4.0), "fcos": (0.0, 0.0, 8.0, 8.0)}[name]
    assert whole in info.anchors["p3"] and len(info.anchors["p3"]) == info.num_anchors


@pytest.mark.parametrize("name", TWO_STAGE)
def test_info_of_a_two_stage_detector(name: str) -> None:
    detector = build(
        name,
        MODEL__ROI_BOX_HEAD__FC_DIM=48,
        MODEL__ROI_BOX_HEAD__POOLER_RESOLUTION=5,
        MODEL__ROI_BOX_HEAD__BBOX_REG_WEIGHTS=[9.0, 8.0, 7.0, 6.0],
    )
    info = describe_detector(detector, "student")
    assert info.name == "GeneralizedRCNN" and info.two_stage
    assert info.dense_levels == ("p2", "p3", "p4", "p5", "p6"), "of its RPN"
    assert info.vector_channels == 48 and info.roi_size == 5 and info.channels == 32
    # Those of a cascade's first stage are keys of their own.
    first = (10.0, 10.0, 5.0, 5.0) if name == "cascade_rcnn" else (9.0, 8.0, 7.0, 6.0)
    assert info.box_weights == first
    view = view_of_teacher(detector.eval(), batch())
    assert view.roi_features(some_boxes()).shape[1:] == (32, 5, 5)
    assert view.roi_predictions(some_boxes()).feature.shape == (5, 48)


def test_unequal_levels_have_no_number_of_channels_in_common() -> None:
    values = {
        "MODEL__BACKBONE__NAME": "build_resnet_backbone",
        "MODEL__RETINANET__IN_FEATURES": ["res4"],
        "MODEL__ANCHOR_GENERATOR__SIZES": [[16, 32]],
    }
    detector = build("retinanet", MODEL__RESNETS__OUT_FEATURES=["res3", "res4"], **values)
    info = describe_detector(detector, "student")
    assert info.dense_levels == ("res4",) and info.num_anchors == 6
    with pytest.raises(ValueError, match=r"RetinaNet has res3 \(32\), res4 \(64\)"):
        info.channels


def test_info_without_a_box_head_says_nothing_of_regions() -> None:
    info = describe_detector(c4_detector(), "teacher")
    assert (info.vector_channels, info.roi_size, info.box_weights) == (0, 0, ())
    assert info.two_stage


def test_subclass_of_a_known_detector_has_its_parent_s_view() -> None:
    parent = build("retinanet")
    child = type("MyRetinaNet", (type(parent),), {})
    assert find_view(child.__new__(child), "student") is find_view(parent, "student")


# Padding -----------------------------------------------------------------------------------------


def cells_with_pixels(sizes: Sequence[Tuple[int, int]], stride: int, like: Tensor) -> Tensor:
    """In loops over pixels: pixel (y, x) lies in the cell (y // stride, x // stride)."""
    inside = torch.zeros(len(sizes), 1, *like.shape[-2:], dtype=torch.bool)
    for image, (height, width) in zip(inside[:, 0].numpy(), sizes):
        for y in range(height):
            for x in range(width):
                image[y // stride, x // stride] = True
    return inside


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn"])
def test_cells_inside_an_image_are_those_with_a_pixel_of_it(name: str) -> None:
    sizes = [(96, 120), (64, 65), (33, 128), (1, 7)]
    inputs = [x for height, width in sizes for x in batch(1, height=height, width=width)]
    view = view_of_teacher(build_teacher(name), inputs)
    assert view.image_size == (96, 128)
    for level, x in view.features.items():
        inside = view.inside_image(level)
        expected = cells_with_pixels(sizes, view.strides[level], x)
        if expected.all():  # a level of one cell
            assert inside is None
        else:
            assert inside.dtype == torch.bool and torch.equal(inside, expected), level


@pytest.mark.parametrize("height, width", [(64, 96), (57, 89)])
def test_without_a_cell_of_padding_there_is_nothing_to_leave_out(height: int, width: int) -> None:
    # 57 x 89 is padded to 64 x 96 as well, but that begins no cell of 8 pixels.
    view = view_of_teacher(build_teacher("retinanet"), batch(height=height, width=width))
    assert view.image_size == (64, 96)
    assert [view.inside_image(level) for level in view.features] == [None] * 5


@pytest.mark.parametrize(
    "sizes, padded",
    [
        ([(16, 17), (9, 24)], False),
        ([(16, 24), (16, 16)], True),
        ([(8, 24), (16, 24)], True),
    ],
)
def test_a_row_or_column_of_padding_in_one_image_is_enough(
    sizes: List[Tuple[int, int]], padded: bool
) -> None:
    like = torch.zeros(2, 5, 2, 3)
    inside = cells_inside(sizes, 8, like)
    assert (inside is not None) == padded
    if padded:
        assert torch.equal(inside, cells_with_pixels(sizes, 8, like))


# The student: recorded in its own forward --------------------------------------------------------


@pytest.mark.parametrize("name", [*DENSE, *TWO_STAGE])
def test_recorded_features_are_those_of_a_second_pass(name: str) -> None:
    # In training mode BatchNorm normalises by the batch itself, not by its running averages, so a
    # second pass over the same batch gives the same bits.
    student, inputs = build(name), masked_batch()
    view = record(student, inputs)
    assert_same(view.features, student.backbone(student.preprocess_image(inputs).tensor))
    assert all(x.requires_grad for x in view.features.values())


@pytest.mark.parametrize("name", [*DENSE, *TWO_STAGE])
def test_recording_changes_neither_losses_nor_hooks(name: str) -> None:
    losses = []
    for recorded in (False, True):
        student, inputs = build(name), masked_batch()
        torch.manual_seed(3)  # the sampling of proposals
        if recorded:
            view = find_view(student, "student")(student, inputs)
            with view.record(view.provides):
                losses.append(student(inputs))
        else:
            losses.append(student(inputs))
    assert_same(losses[1], losses[0])
    assert not hooked(student)


def hooked(detector: nn.Module) -> List[str]:
    """Modules with a hook, or a method in place of their class's own."""
    return [
        name
        for name, x in detector.named_modules()
        if x._forward_hooks or x._forward_pre_hooks or any(hasattr(type(x), k) for k in vars(x))
    ]


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn"])
def test_hooks_are_removed_when_the_forward_raises(name: str) -> None:
    student, inputs = build(name), masked_batch()
    view = find_view(student, "student")(student, inputs)
    with pytest.raises(ZeroDivisionError):
        with view.record(view.provides):
            assert hooked(student)
            student.backbone(student.preprocess_image(inputs).tensor)
            raise ZeroDivisionError
    assert not hooked(student)


@pytest.mark.parametrize("name", [*DENSE, *TWO_STAGE])
def test_student_runs_each_module_once(name: str) -> None:
    student, inputs, calls = build(name), masked_batch(), []
    student.backbone.register_forward_hook(lambda *_: calls.append("backbone"))
    view = record(student, inputs)
    view.features, view.dense(), view.roi_features(some_boxes())
    if "roi_predictions" in view.provides:
        view.roi_predictions()
    assert calls == ["backbone"]


@pytest.mark.parametrize("name", DENSE)
def test_student_s_dense_predictions_are_those_of_its_head(name: str) -> None:
    student, inputs = build(name), masked_batch()
    dense = record(student, inputs).dense()
    assert dense.levels == ["p3", "p4", "p5", "p6", "p7"]
    features = student.backbone(student.preprocess_image(inputs).tensor)
    features = [features[k] for k in dense.levels]
    logits, deltas, *centerness = student.head(features)
    assert_same(dense.logits, logits)
    assert_same(dense.deltas, deltas)
    assert_same(dense.tower, [student.head.cls_subnet(x) for x in features])
    assert (dense.centerness is None) == (name == "retinanet")
    if centerness:
        assert_same(dense.centerness, centerness[0])
    assert all(x.requires_grad for x in dense.logits + dense.deltas + dense.tower)


@pytest.mark.parametrize("name", TWO_STAGE)
def test_two_stage_student_answers_dense_with_its_rpn(name: str) -> None:
    student, inputs = build(name), masked_batch()
    dense = record(student, inputs).dense()
    assert dense.levels == ["p2", "p3", "p4", "p5", "p6"]
    assert_rpn(dense, student, student.backbone(student.preprocess_image(inputs).tensor))
    assert all(x.requires_grad for x in dense.logits + dense.deltas + dense.tower)


def assert_rpn(dense: Any, detector: nn.Module, features: Dict[str, Tensor]) -> None:
    rpn_head = detector.proposal_generator.rpn_head
    logits, deltas = rpn_head([features[k] for k in dense.levels])
    assert_same(dense.logits, logits)
    assert_same(dense.deltas, deltas)
    assert dense.centerness is None
    # The tower's output is what the two 1x1 predictors read.
    assert_same([rpn_head.objectness_logits(x) for x in dense.tower], logits)


@pytest.mark.parametrize("name", TWO_STAGE)
def test_student_s_roi_predictions_are_those_of_its_own_training_pass(name: str) -> None:
    student, inputs, first_stage = build(name), masked_batch(), []
    predictor = student.roi_heads.box_predictor
    predictor = predictor[0] if name == "cascade_rcnn" else predictor
    predictor.register_forward_hook(lambda module, x, output: first_stage.append((x[0], *output)))
    view = record(student, inputs)
    predictions = view.roi_predictions()
    assert len(first_stage) == 1, "computed once, by the student itself"
    feature, logits, deltas = first_stage[0]
    assert predictions.feature is feature
    assert predictions.logits is logits and predictions.deltas is deltas
    # A row for every sampled box, and classes to go with it.
    sampled = view.regions().boxes
    rows = sum(len(x) for x in sampled)
    assert 0 < rows == len(feature) == len(logits) == len(deltas)
    assert [len(x.gt_classes) for x in view.sampled_proposals] == [len(x) for x in sampled]
    for boxes, proposals in zip(sampled, view.sampled_proposals):
        assert torch.equal(boxes.tensor, proposals.proposal_boxes.tensor)
    # Asked for these very boxes, the box head says the same again.
    again = view.roi_predictions(sampled)
    assert_same([again.feature, again.logits, again.deltas], [feature, logits, deltas])


# What a head must not do -------------------------------------------------------------------------


def test_member_that_was_not_recorded_is_refused() -> None:
    view = record(build("faster_rcnn"), batch(), frozenset({"features"}))
    assert view.features
    for ask, name in ((view.dense, "dense"), (view.roi_predictions, "roi_predictions")):
        with pytest.raises(RuntimeError, match=f"student's '{name}' was not recorded .*`requires`"):
            ask()


@pytest.mark.parametrize(
    "name, word, ask",
    [
        ("retinanet", "regions", lambda view: view.regions()),
        ("retinanet", "region_vectors", lambda view: view.region_vectors(view.regions())),
        ("retinanet", "anchor_labels", lambda view: view.anchor_labels().maps),
        ("retinanet", "tower_1", lambda view: view.towers(1).classes),
        ("mask_rcnn", "regions", lambda view: view.regions()),
        ("mask_rcnn", "region_vectors", lambda view: view.region_vectors(view.regions())),
        ("mask_rcnn", "roi_predictions", lambda view: view.roi_predictions().logits),
        ("mask_rcnn", "roi_predictions", lambda view: view.sampled_proposals),
        ("mask_rcnn", "mask_logits", lambda view: view.mask_logits()),
        ("mask_rcnn", "mask_features", lambda view: view.mask_features()),
    ],
)
def test_head_may_require_a_single_member(
    name: str, word: str, ask: Callable[[DetectorView], Any]
) -> None:
    assert len(ask(record(build(name), masked_batch(), frozenset({word})))) > 0


def change_features(view: DetectorView) -> None:
    with torch.no_grad():
        view._recorded["backbone"][1]["p4"].add_(1)


def change_deltas(view: DetectorView) -> None:
    with torch.no_grad():
        view._recorded["dense"].deltas[0][:, 0].zero_()


@pytest.mark.parametrize(
    "change, ask, name",
    [
        (change_features, lambda view: view.features, "backbone"),
        (change_deltas, lambda view: view.dense(), "dense"),
    ],
)
def test_recorded_tensor_that_was_changed_in_place_is_refused(
    change: Callable[[DetectorView], None], ask: Callable[[DetectorView], Any], name: str
) -> None:
    view = record(build("retinanet"), batch())
    ask(view)
    change(view)
    with pytest.raises(RuntimeError, match=f"student's '{name}' was changed in place"):
        ask(view)


def test_level_of_a_teacher_that_one_head_changed_in_place_is_refused_to_the_next() -> None:
    # float() of float32 copies nothing: what looks like a tensor of the head's own is shared.
    view = view_of_teacher(build_teacher("retinanet"), batch())
    view.features["p4"]
    view.features["p3"].float().sub_(1)
    assert view.features["p4"].isfinite().all()
    with pytest.raises(RuntimeError, match="map of the teacher was changed in place"):
        view.features["p3"]


def test_predictions_of_a_teacher_that_one_head_changed_in_place_are_refused_to_the_next() -> None:
    view = view_of_teacher(build_teacher("retinanet"), batch())
    view.dense()
    change_deltas(view)
    with pytest.raises(RuntimeError, match="map of the teacher was changed in place"):
        view.dense().deltas
    # What is recorded as it runs, here an RPN's, is the teacher's too.
    view = view_of_teacher(build_teacher("faster_rcnn"), batch())
    view.dense()
    change_deltas(view)
    with pytest.raises(RuntimeError, match="teacher's 'dense' was changed in place"):
        view.dense()


@pytest.mark.parametrize("last", [False, True])
def test_probabilities_in_place_of_logits_are_kept_out(last: bool) -> None:
    # A 64 x 64 image has one cell on p6 and p7. There, and on all levels where the channels are
    # last in memory, the reordering to (N, Hi*Wi*A, K) that Detectron2 makes before its sigmoid_()
    # is a view of the logits.
    detector, inputs = build("retinanet"), batch()
    if last:
        detector.to(memory_format=torch.channels_last)
    originals = {}

    def remember(module: nn.Module, x: Any, output: Any) -> None:
        originals["raw"], originals["copy"] = output[0], [y.clone() for y in output[0]]

    detector.head.register_forward_hook(remember)
    view = record(detector, inputs)
    dense = view.dense()
    assert [tuple(x.shape[-2:]) for x in dense.logits[-2:]] == [(1, 1), (1, 1)]
    with torch.no_grad():
        for x in originals["raw"]:
            n, _, height, width = x.shape
            split = x.view(n, -1, 3, height, width)
            split.permute(0, 3, 4, 1, 2).reshape(n, -1, 3)[0].sigmoid_()
    changed = [not torch.equal(a, b) for a, b in zip(originals["raw"], originals["copy"])]
    assert changed == [last, last, last, True, True], "the trap itself"
    assert_same(view.dense().logits, originals["copy"])


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("retinanet", {}),
        # One anchor per cell: the reordering is a view on levels of any size.
        ("retinanet", {"MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS": [[1.0]]}),
        pytest.param("fcos", {}, marks=needs_fcos),
        ("faster_rcnn", {}),
        ("faster_rcnn", {"MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS": [[1.0]]}),
    ],
)
def test_logits_outlive_the_detector_s_own_inference(name: str, overrides: Dict[str, Any]) -> None:
    detector, inputs, maps = build_teacher(name, **overrides), batch(), []
    head = detector.proposal_generator.rpn_head if name == "faster_rcnn" else detector.head
    head.register_forward_hook(
        lambda m, x, output: maps.extend([y.clone() for y in x] for x in output)
    )
    dense = record(detector, inputs).dense()
    assert_same(dense.logits, maps[0])
    if name == "fcos":  # whose inference makes probabilities of it, too
        assert_same(dense.centerness, maps[2])


# The teacher: computed when asked ----------------------------------------------------------------


def test_teacher_computes_what_it_is_asked_for_and_once() -> None:
    teacher, calls = build_teacher("faster_rcnn"), []
    parts = {
        "backbone": teacher.backbone,
        "rpn": teacher.proposal_generator.rpn_head,
        "box_head": teacher.roi_heads.box_head,
    }
    for name, module in parts.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    view = view_of_teacher(teacher, batch())
    assert calls == []
    view.features, view.features, view.image_size
    assert calls == ["backbone"]
    view.dense(), view.dense()
    assert calls == ["backbone", "rpn"]
    view.roi_predictions(some_boxes())
    assert calls == ["backbone", "rpn", "box_head"]


def count_calls(modules: Dict[str, nn.Module]) -> Dict[str, int]:
    """How often each runs from now on."""
    calls = {name: 0 for name in modules}

    def count(name: str, module: nn.Module) -> None:
        def on_forward(*_: Any) -> None:
            calls[name] += 1

        module.register_forward_hook(on_forward)

    for name, module in modules.items():
        count(name, module)
    return calls


def test_same_boxes_are_pooled_and_judged_once() -> None:
    # Several heads ask for the same regions, an object; equal boxes of another are other boxes.
    teacher = build_teacher("faster_rcnn")
    roi_heads = teacher.roi_heads
    calls = count_calls({"pooler": roi_heads.box_pooler, "head": roi_heads.box_head})
    view, boxes = view_of_teacher(teacher, batch()), some_boxes()
    features = view.roi_features(boxes)
    assert view.roi_features(boxes) is features and calls == {"pooler": 1, "head": 0}
    predictions = view.roi_predictions(boxes)
    assert view.roi_predictions(boxes) is predictions
    assert view.roi_features(boxes) is features and calls == {"pooler": 1, "head": 1}
    other = view.roi_predictions(some_boxes())
    assert other is not predictions and calls == {"pooler": 2, "head": 2}
    assert_same([other.feature, other.logits], [predictions.feature, predictions.logits])


@pytest.mark.parametrize("labelled", [True, False])
def test_head_that_asks_without_gradient_leaves_it_to_those_that_ask_later(labelled: bool) -> None:
    detector, boxes = build("faster_rcnn"), some_boxes()
    if labelled:
        view = record(detector, batch())
    else:
        view = RCNNView.of_unlabelled(detector, batch(), frozenset({"features", "roi_features"}))
    with torch.no_grad():
        view.features["p3"], view.roi_features(boxes)
    assert view.features["p3"].requires_grad and view.roi_features(boxes).requires_grad


def test_a_teacher_detects_once_for_all_heads() -> None:
    detector, passes = build_teacher("retinanet"), []
    detector.head.register_forward_hook(lambda *_: passes.append(1))
    view = view_of_teacher(detector, batch())
    found = view.detections()
    assert view.detections() is found and len(found) == len(view.batched_inputs)
    assert len(passes) == 1


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn"])
def test_detections_are_in_pixels_of_the_input_also_of_a_file_of_another_size(name: str) -> None:
    keys = ("RETINANET", "ROI_HEADS")
    detector = build_teacher(name, **{f"MODEL__{x}__SCORE_THRESH_TEST": 0.0 for x in keys})
    inputs = batch()
    resized = [{**x, "height": 2 * x["height"], "width": 3 * x["width"]} for x in inputs]
    for x, y in zip(*(view_of_teacher(detector, z).detections() for z in (inputs, resized))):
        assert y.image_size == (64, 64) and len(x) > 0
        assert torch.equal(x.pred_boxes.tensor, y.pred_boxes.tensor)
    assert not hooked(detector)


def test_answer_for_boxes_that_are_gone_is_given_to_no_others() -> None:
    # A list that is freed may leave its id to the next one.
    view = view_of_teacher(build_teacher("retinanet"), batch())
    for shift in range(20):
        boxes = [Boxes(x.tensor + shift) for x in some_boxes()]
        found = view.roi_features(boxes)
        fresh = view_of_teacher(view.detector, batch())
        fresh._recorded["backbone"] = view._part("backbone")
        assert_same(found, fresh.roi_features([Boxes(x.tensor) for x in boxes]))
        del boxes


@pytest.mark.parametrize("name", TWO_STAGE)
def test_student_is_asked_nothing_twice_about_its_own_regions(name: str) -> None:
    student, inputs = build(name), masked_batch()
    roi_heads, stages = student.roi_heads, 3 if name == "cascade_rcnn" else 1
    box_head = roi_heads.box_head[0] if name == "cascade_rcnn" else roi_heads.box_head
    calls = count_calls({"pooler": roi_heads.box_pooler, "head": box_head})
    pooled: List[Tensor] = []
    roi_heads.box_pooler.register_forward_hook(lambda module, x, output: pooled.append(output))
    view = record(student, inputs, frozenset({"regions", "region_vectors", "roi_features"}))
    regions = view.regions(RegionSampler())
    assert view.roi_features(regions.boxes) is pooled[0], "of the first stage"
    assert view.region_vectors(regions) is view.roi_predictions().feature
    assert calls == {"pooler": stages, "head": 1}
    assert len(pooled[0]) == len(regions) == len(view.region_vectors(regions))


@pytest.mark.parametrize("name", TWO_STAGE)
def test_teacher_s_vectors_of_regions_are_those_of_its_box_head(name: str) -> None:
    regions = record(build("faster_rcnn"), batch()).regions(RegionSampler())
    teacher = build_teacher(name)
    calls = count_calls({"pooler": teacher.roi_heads.box_pooler})
    view = view_of_teacher(teacher, batch())
    vectors = view.region_vectors(regions)
    assert vectors is view.roi_predictions(regions.boxes).feature
    assert vectors.shape == (len(regions), 32) and not vectors.requires_grad
    view.roi_features(regions.boxes)
    assert calls == {"pooler": 1}


@pytest.mark.parametrize("name", [*DENSE, *TWO_STAGE])
def test_nothing_of_the_teacher_carries_a_gradient(name: str) -> None:
    view = view_of_teacher(build_teacher(name), batch())
    dense = view.dense()
    found = [*view.features.values(), *dense.logits, *dense.deltas, *dense.tower]
    found += [view.roi_features(some_boxes())]
    if "roi_predictions" in view.provides:
        predictions = view.roi_predictions(some_boxes())
        found += [predictions.feature, predictions.logits, predictions.deltas]
    assert not any(x.requires_grad for x in found)


@pytest.mark.parametrize("name", [*DENSE, *TWO_STAGE])
@torch.no_grad()
def test_teacher_s_parts_are_those_of_detectron2_s_modules(name: str) -> None:
    teacher, inputs = build_teacher(name), batch(height=50, width=64)
    view = view_of_teacher(teacher, inputs)
    features = teacher.backbone(teacher.preprocess_image(inputs).tensor)
    assert_same(view.features, features)
    dense = view.dense()
    if name in ("retinanet", "fcos"):
        logits, deltas, *_ = teacher.head([features[k] for k in dense.levels])
        assert_same(dense.logits, logits)
        assert_same(dense.deltas, deltas)
    else:
        assert_rpn(dense, teacher, features)
    assert not hooked(teacher)


@pytest.mark.parametrize("name", TWO_STAGE)
@torch.no_grad()
def test_teacher_s_answer_for_boxes_is_that_of_its_box_head(name: str) -> None:
    teacher, inputs, boxes = build_teacher(name), batch(), some_boxes()
    view = view_of_teacher(teacher, inputs)
    roi_heads = teacher.roi_heads
    features = [view.features[k] for k in ("p2", "p3", "p4", "p5")]
    pooled = roi_heads.box_pooler(features, boxes)
    assert_same(view.roi_features(boxes), pooled)
    head, predictor = roi_heads.box_head, roi_heads.box_predictor
    if name == "cascade_rcnn":
        head, predictor = head[0], predictor[0]
    predictions = view.roi_predictions(boxes)
    logits, deltas = predictor(head(pooled))
    assert_same([predictions.feature, predictions.logits], [head(pooled), logits])
    assert_same(predictions.deltas, deltas)
    assert logits.shape == (5, 4), "R boxes, K + 1 classes"
    assert deltas.shape == (5, 4 if name == "cascade_rcnn" else 12)


@torch.no_grad()
def test_a_box_of_224_pixels_belongs_to_stride_16() -> None:
    # Level 4 + log2(side / 224), rounded down: 112 to p3, 224 to p4, 448 to p5.
    inputs = batch(num_images=1, height=512, width=512)
    view = view_of_teacher(build_teacher("retinanet"), inputs)
    boxes = [Boxes(torch.tensor([[0.0, 0.0, side, side] for side in (112, 224, 448)]))]
    maps, rois = [view.features[k] for k in ("p3", "p4", "p5")], Regions(boxes).rois
    every = roi_align_levels(maps, [8, 16, 32], rois, (7, 7))
    assert_same(view.roi_features(boxes), every[torch.arange(3), torch.tensor([0, 1, 2])])


@torch.no_grad()
@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn"])
def test_boxes_are_not_rounded_to_the_format_of_the_maps(name: str) -> None:
    # bfloat16 knows no number between 1008 and 1012.
    boxes = [Boxes(torch.tensor([[1010.0, 10.0, 1034.0, 30.0]]))]
    with torch.autocast("cpu", torch.bfloat16):
        inputs = batch(num_images=1, height=64, width=1088)
        view = view_of_teacher(build_teacher(name), inputs)
        found = view.roi_features(boxes)
    maps = [view.features[k] for k in view.pooled_levels]
    assert all(x.dtype == torch.bfloat16 for x in maps)
    assert_same(found, view.pooler([x.float() for x in maps], boxes))


@torch.no_grad()
def test_mean_in_boxes_is_that_of_the_cells_they_cover() -> None:
    view = view_of_teacher(build_teacher("faster_rcnn"), batch(height=256, width=256))
    maps = {f"p{i}": torch.randn(2, 3, 256 >> i, 256 >> i) for i in range(2, 7)}
    # (image, level, top, left, bottom, right) in cells. floor(4 + log2(side / 224)) is the level:
    # below 112 pixels p2, the finest, below 224 p3, then p4.
    cells = [
        (0, "p2", 3, 5, 4, 6),
        (0, "p2", 0, 0, 12, 27),
        (0, "p3", 2, 4, 17, 19),
        (1, "p4", 1, 2, 15, 16),
        (1, "p2", 50, 40, 64, 44),
        (1, "p4", 0, 0, 16, 16),
    ]
    boxes = [
        Boxes(torch.tensor([box for m, box in in_pixels(view, cells) if m == n])) for n in (0, 1)
    ]
    expected = [maps[k][n, :, y0:y1, x0:x1].mean(dim=(1, 2)) for n, k, y0, x0, y1, x1 in cells]
    found = view.mean_in_boxes(maps, boxes)  # p6 is left out: nothing is pooled from it
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
    # Of some levels, the nearest one serves: p3 for all of these boxes, which cover its cells.
    only = {"p3": maps["p3"]}
    wide = [
        Boxes(torch.tensor([[0.0, 8.0, 16.0, 24.0]])),
        Boxes(torch.tensor([[0.0, 0, 256, 256]])),
    ]
    expected = [maps["p3"][0, :, 1:3, 0:2], maps["p3"][1]]
    expected = torch.stack([x.mean(dim=(1, 2)) for x in expected])
    torch.testing.assert_close(view.mean_in_boxes(only, wide), expected, rtol=1e-4, atol=1e-5)


def in_pixels(view: DetectorView, cells: Sequence[Tuple]) -> List[Tuple[int, List[float]]]:
    """(image, level, top, left, bottom, right) in cells to (image, XYXY)."""
    return [
        (n, [float(v * view.strides[k]) for v in (x0, y0, x1, y1)])
        for n, k, y0, x0, y1, x1 in cells
    ]


@pytest.mark.parametrize("levels", [["p3", "p5"], ["p6"], []])
def test_mean_in_boxes_wants_neighbouring_levels(levels: List[str]) -> None:
    view = view_of_teacher(build_teacher("faster_rcnn"), batch())
    maps = {k: torch.zeros(2, 1, 8, 8) for k in levels}
    with pytest.raises(ValueError, match=rf"out of p2, p3, p4, p5, got {', '.join(levels)}\."):
        view.mean_in_boxes(maps, some_boxes())


@torch.no_grad()
def test_no_boxes_at_all_give_no_rows() -> None:
    view = view_of_teacher(build_teacher("faster_rcnn"), batch())
    none = [Boxes(torch.zeros(0, 4)), Boxes(torch.zeros(0, 4))]
    assert view.roi_features(none).shape[0] == 0
    assert view.roi_predictions(none).logits.shape == (0, 4)
    assert view.mean_in_boxes({"p3": torch.ones(2, 5, 8, 8)}, none).shape == (0, 5)


def test_student_pools_boxes_of_a_head_s_own_choice_without_recorded_regions() -> None:
    student = build("faster_rcnn")
    view = record(student, batch(), frozenset({"features", "roi_features"}))
    boxes = some_boxes()
    features = [view.features[k] for k in ("p2", "p3", "p4", "p5")]
    assert_same(view.roi_features(boxes), student.roi_heads.box_pooler(features, boxes))


def test_regions_are_the_boxes_before_they_are_refined_for_the_mask_head() -> None:
    # TRAIN_ON_PRED_BOXES writes the box head's own boxes over the proposals, for masks.
    student = build("mask_rcnn", MODEL__ROI_BOX_HEAD__TRAIN_ON_PRED_BOXES=True)
    pooled: List[Tensor] = []
    student.roi_heads.box_pooler.register_forward_hook(
        lambda module, x, output: pooled.extend(y.tensor.clone() for y in x[1])
    )
    view = record(student, masked_batch())
    assert_same([x.tensor for x in view.regions().boxes], pooled)
    refined = [x.proposal_boxes.tensor for x in view.sampled_proposals]
    assert not torch.equal(torch.cat(refined), torch.cat(pooled)), "they were refined"
