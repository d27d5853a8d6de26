"""All that any view has is documented in DetectorView; what a detector lacks is refused by name."""

import ast
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, Set

import pytest
import torch
from torch import nn

import d2kd.views
from d2kd import DETECTOR_VIEW_REGISTRY, DetectorView
from d2kd.conformance.requires import WORDS
from d2kd.views import CommonClassesView, RegionSampler, ReorderedAnchorsView, find_view
from d2kd.views.recording import Recording
from tests.helpers.toys import batch
from tests.helpers.view_toys import DENSE, build, build_teacher, c4_detector, record, some_boxes

# How a head asks for each member, and the word that it has to require.
ASKED: Dict[str, Callable[[Any], Any]] = {
    "dense": lambda view: view.dense(),
    "dense of boxes": lambda view: view.boxes([]),
    "tower_1": lambda view: view.towers(1),
    "tower_1 of predictions": lambda view: view.predict_from(1, None),
    "anchor_labels": lambda view: view.anchor_labels(),
    "roi_features": lambda view: view.roi_features(some_boxes()),
    "roi_features of levels": lambda view: view.pooled_levels,
    "roi_features of a pooler": lambda view: view.pooler,
    "roi_features of means": lambda view: view.mean_in_boxes({}, some_boxes()),
    "roi_predictions": lambda view: view.roi_predictions(some_boxes()),
    "roi_predictions of labels": lambda view: view.sampled_proposals,
    "mask_logits": lambda view: view.mask_logits(some_boxes()),
    "mask_features": lambda view: view.mask_features(some_boxes()),
    "mask_features of labels": lambda view: view.mask_proposals,
    "mask_features of regions": lambda view: view.mask_regions,
    "regions": lambda view: view.regions(),
    "region_vectors": lambda view: view.region_vectors(None),
}
# What a head need not require.
ALWAYS = {"detector", "batched_inputs", "provides", "info", "two_stage", "num_classes"}
ALWAYS |= {"num_anchors", "strides", "image_sizes", "image_size", "inside_image"}


def public(cls: type) -> Set[str]:
    return {name for name in dir(cls) if not name.startswith("_")}


def view_classes() -> List[type]:
    registered = [cls for _, cls in DETECTOR_VIEW_REGISTRY if cls.__module__.startswith("d2kd.")]
    return list(dict.fromkeys([*registered, CommonClassesView, ReorderedAnchorsView]))


@pytest.mark.parametrize("cls", view_classes())
def test_every_member_of_a_view_is_one_of_the_contract(cls: type) -> None:
    assert public(cls) <= public(DetectorView)


def test_every_member_is_documented_where_a_head_s_author_looks() -> None:
    view = DetectorView(build("retinanet"))
    listed = set(re.findall(r"\w+", DetectorView.__doc__))
    members = public(DetectorView) | {k for k in vars(view) if not k.startswith("_")}
    own_business = public(Recording) | {"requires"}  # of the Distiller and of families
    assert members - own_business - listed == set()
    # What is not there always has a word, which the conformance kit holds heads to.
    assert members - own_business - ALWAYS == set(WORDS)
    without = [
        k for k in public(DetectorView) if not (getattr(DetectorView, k).__doc__ or "").strip()
    ]
    assert without == []


def absent(name: str) -> nn.Module:
    """Detectors that have less than others of their family, and one of no family."""
    if name == "c4":
        return c4_detector()
    if name == "no rpn":
        return build("faster_rcnn", MODEL__PROPOSAL_GENERATOR__NAME="PrecomputedProposals")
    return build(name)


@pytest.mark.parametrize("name", [*DENSE, "faster_rcnn", "c4", "no rpn"])
def test_member_that_a_detector_does_not_provide_is_refused_by_name(name: str) -> None:
    detector = absent(name)
    view = find_view(detector, "teacher")(detector, batch())
    refused = []
    of = f"^{type(view).__name__} of {type(detector).__name__}"
    for question, ask in ASKED.items():
        word = question.split()[0]
        if word not in view.provides:
            with pytest.raises(NotImplementedError, match=f"{of} does not provide '{word}', only "):
                ask(view)
            refused.append(word)
    assert len(refused) > 1


def test_a_view_that_defines_nothing_refuses_all_but_features() -> None:
    view = DetectorView(build("retinanet"), batch())
    assert view.features and view.provides == {"features"}
    for question, ask in ASKED.items():
        with pytest.raises(
            NotImplementedError, match=f"not provide '{question.split()[0]}', only features"
        ):
            ask(view)


@pytest.mark.parametrize("depth", [0, 2])
def test_tower_deeper_than_a_detector_s_is_refused(depth: int) -> None:
    view = find_view(build("retinanet"), "teacher")(build_teacher("retinanet"), batch())
    for ask in (lambda: view.towers(depth), lambda: view.predict_from(depth, None)):
        with pytest.raises(NotImplementedError, match=f"does not provide 'tower_{depth}'"):
            ask()


@pytest.mark.parametrize(
    "name, member, ask",
    [
        ("retinanet", "anchor_labels", lambda view: view.anchor_labels()),
        ("faster_rcnn", "sampled_proposals", lambda view: view.sampled_proposals),
        ("faster_rcnn", "regions", lambda view: view.regions()),
        ("faster_rcnn", "roi_predictions", lambda view: view.roi_predictions()),
    ],
)
def test_a_teacher_has_nothing_that_only_a_training_forward_gives(
    name: str, member: str, ask: Callable[[DetectorView], Any]
) -> None:
    detector = build_teacher(name)
    with pytest.raises(RuntimeError, match=f"A teacher has no '{member}'"):
        ask(find_view(detector, "teacher")(detector, batch()))


# Nothing is computed twice -----------------------------------------------------------------------


@pytest.mark.parametrize("name", [*DENSE, "faster_rcnn", "cascade_rcnn"])
def test_each_answer_is_computed_once(name: str) -> None:
    inputs = batch(1, height=64, width=96) + batch(1, height=40, width=50, seed=1)
    view = record(build(name), inputs)
    regions = view.regions()
    level = next(iter(view.features))
    answers = [
        lambda: view.gt_instances,
        lambda: view.features,
        lambda: view.inside_image(level),
        lambda: view.dense(),
        lambda: view.regions(RegionSampler()),
        lambda: view.roi_features(regions.boxes),
    ]
    assert view.inside_image(level) is not None
    if view.two_stage:
        answers.append(view.roi_predictions)
    else:
        answers += [view.anchor_labels, lambda: view.region_vectors(regions)]
    for ask in answers:
        assert ask() is ask()


def test_padding_of_a_cropped_map_is_its_own() -> None:
    view = record(build("retinanet"), batch(1) + batch(1, height=40, width=50))
    whole, cropped = view.inside_image("p3"), view.inside_image("p3", torch.zeros(2, 1, 6, 7))
    assert cropped.shape == (2, 1, 6, 7) and torch.equal(cropped, whole[..., :6, :7])


def test_boxes_of_a_two_stage_detector_are_those_that_its_rpn_decodes() -> None:
    detector = build_teacher("faster_rcnn")
    view, rpn = find_view(detector, "teacher")(detector, batch()), detector.proposal_generator
    dense = view.dense()
    anchors = rpn.anchor_generator(dense.deltas)
    rows = [x.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in dense.deltas]
    expected = rpn._decode_proposals(anchors, rows)
    for found, x in zip(view.boxes(dense.deltas), expected):
        found = found.unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
        assert torch.equal(found, x)


# The package -------------------------------------------------------------------------------------


def test_modules_of_views_import_each_other_in_no_circle() -> None:
    folder = Path(d2kd.views.__file__).parent
    imports = {}
    for path in folder.glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        found = [x.module for x in nodes if isinstance(x, ast.ImportFrom) and x.level == 1]
        imports[path.stem] = set(found)
    imports.pop("__init__")
    while imports:
        leaves = [name for name, others in imports.items() if not others & set(imports)]
        assert leaves, f"a circle among {sorted(imports)}"
        for name in leaves:
            imports.pop(name)
