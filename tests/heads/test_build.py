"""How YAML names a head, and which pairs of detectors a head refuses."""

from typing import Any, Callable, Dict, FrozenSet, Iterator, Set, Type

import pytest
from torch import nn

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec

from d2kd import DISTILL_HEAD_REGISTRY, load_config
from d2kd.heads import DetectorInfo, DistillPair, MGDHead, PKDHead, build_head, head_class
from d2kd.heads.fit import requires_of
from d2kd.heads.registry import head_names
from d2kd.pairing.levels import pair_levels
from d2kd.pairing.pair import ANY_PAIR, DENSE, SAME_KIND, TWO_STAGE
from tests.helpers.logit_references import refusal_of

RETINANET = {
    "name": "RetinaNet",
    "provides": frozenset({"features", "dense", "roi_features"}),
    "num_anchors": 9,
}
FASTER_RCNN = {
    "name": "GeneralizedRCNN",
    "provides": frozenset({"features", "dense", "roi_features", "roi_predictions"}),
    "num_anchors": 3,
    "two_stage": True,
}


class ToyHead(nn.Module):
    """The least that is a head."""

    @configurable
    def __init__(self, *, colour: str):
        super().__init__()
        self.colour = colour

    @staticmethod
    def add_config(node: CfgNode) -> None:
        node.LOSS_WEIGHT = 1.0
        node.COLOUR = "red"

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair) -> Dict[str, Any]:
        return {"colour": cfg.DISTILL.Toy.COLOUR}


@pytest.fixture
def register() -> Iterator[Callable[..., Type[nn.Module]]]:
    """Register a ToyHead with the given class attributes as "Toy"; forgotten after the test."""

    def register_toy(**attributes: Any) -> Type[nn.Module]:
        cls = type("ToyHead", (ToyHead,), attributes)
        DISTILL_HEAD_REGISTRY.register(cls)
        return cls

    yield register_toy
    DISTILL_HEAD_REGISTRY._obj_map.pop("ToyHead", None)


def make_pair(
    student: Dict[str, Any], teacher: Dict[str, Any], classes: Dict[str, int]
) -> DistillPair:
    shapes = {"p3": ShapeSpec(channels=4, stride=8)}
    infos = [
        DetectorInfo(shapes=shapes, num_classes=classes[side], **detector)
        for side, detector in (("student", student), ("teacher", teacher))
    ]
    return DistillPair(*infos, pair_levels(shapes, shapes))


SAME_CLASSES = {"student": 3, "teacher": 3}


def test_head_names_are_the_classes_without_head() -> None:
    assert {"MGD", "PKD"} <= set(head_names())
    assert head_class("MGD") is MGDHead and head_class("PKD") is PKDHead


def test_every_registered_head_has_its_keys_its_weight_and_its_schedule() -> None:
    cfg = load_config()
    for name in head_names():
        assert cfg.DISTILL[name].LOSS_WEIGHT > 0
        assert cfg.DISTILL[name].SCHEDULE.STOP_ITER == -1


@pytest.mark.parametrize("name", head_names())
def test_case_of_a_head_matters_only_to_be_told(name: str) -> None:
    for spelled in {name.lower(), name.upper()} - {name}:
        with pytest.raises(ValueError, match=rf"head '{spelled}'. Did you mean '{name}'\?"):
            head_class(spelled)


@pytest.mark.parametrize("name, near", [("MDG", "MGD"), ("mgd", "MGD"), ("PKDHead", "PKD")])
def test_unknown_head_is_refused_with_the_nearest_one(name: str, near: str) -> None:
    with pytest.raises(
        ValueError, match=f"unknown head '{name}'. Did you mean .*'{near}'"
    ) as error:
        head_class(name)
    assert all(known in str(error.value) for known in head_names())


def test_unknown_head_like_no_other_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match=r"unknown head 'Xyz'\. Known: .*MGD.*PKD.* --plugin"):
        head_class("Xyz")


def test_head_of_a_user_has_keys_and_is_built_from_them(register: Callable) -> None:
    register()
    cfg = load_config(opts=["DISTILL.Toy.COLOUR", "blue"])
    head = build_head("Toy", cfg, make_pair(RETINANET, RETINANET, SAME_CLASSES))
    assert head.colour == "blue"
    pair = make_pair(RETINANET, RETINANET, SAME_CLASSES)
    assert requires_of(head_class("Toy"), cfg, pair) == {"features"}, "the default"


@pytest.mark.parametrize(
    "attributes", [{"requires": "dense"}, {"pairs": "dense -> dense"}, {"no_weight_decay": "t"}]
)
def test_a_word_in_place_of_a_set_of_words_is_refused(
    register: Callable, attributes: Dict[str, str]
) -> None:
    ((name, word),) = attributes.items()
    with pytest.raises(ValueError, match=rf"ToyHead\.{name} .*: frozenset\(\{{'{word}'\}}\)"):
        register(**attributes)


def test_head_with_a_lazy_layer_is_refused(register: Callable) -> None:
    def build(self: nn.Module, cfg: CfgNode, pair: DistillPair) -> None:
        nn.Module.__init__(self)
        self.conv = nn.LazyConv2d(4, 1)

    register(__init__=build)
    with pytest.raises(TypeError, match="ToyHead: conv.weight, conv.bias gets its shape in the fi"):
        build_head("Toy", load_config(), make_pair(RETINANET, RETINANET, SAME_CLASSES))


def test_head_that_needs_what_the_student_cannot_give_is_refused(register: Callable) -> None:
    register(requires=frozenset({"features", "roi_predictions"}))
    with pytest.raises(ValueError, match="Toy needs roi_predictions; the student RetinaNet has"):
        build_head("Toy", load_config(), make_pair(RETINANET, FASTER_RCNN, SAME_CLASSES))


def test_head_that_needs_what_the_teacher_cannot_give_is_refused(register: Callable) -> None:
    register(requires=frozenset({"roi_predictions"}))
    with pytest.raises(ValueError, match="Toy needs roi_predictions; the teacher RetinaNet has"):
        build_head("Toy", load_config(), make_pair(FASTER_RCNN, RETINANET, SAME_CLASSES))


def test_head_that_needs_what_both_can_give_is_built(register: Callable) -> None:
    cls = register(requires=frozenset({"roi_predictions"}))
    pair = make_pair(FASTER_RCNN, FASTER_RCNN, SAME_CLASSES)
    assert type(build_head("Toy", load_config(), pair)) is cls


@pytest.mark.parametrize(
    "detector, expected", [(RETINANET, {"dense"}), (FASTER_RCNN, {"roi_predictions"})]
)
def test_what_a_head_needs_may_depend_on_the_pair(
    register: Callable, detector: Dict[str, Any], expected: Set[str]
) -> None:
    def requires(cfg: CfgNode, pair: DistillPair) -> FrozenSet[str]:
        return frozenset({"roi_predictions" if pair.student.two_stage else "dense"})

    cls = register(requires=staticmethod(requires))
    pair = make_pair(detector, detector, SAME_CLASSES)
    assert requires_of(cls, load_config(), pair) == expected
    assert type(build_head("Toy", load_config(), pair)) is cls
    with pytest.raises(ValueError, match="Toy needs roi_predictions; the teacher RetinaNet has"):
        build_head("Toy", load_config(), make_pair(FASTER_RCNN, RETINANET, SAME_CLASSES))


def test_what_a_head_needs_may_depend_on_its_keys(register: Callable) -> None:
    def requires(cfg: CfgNode, pair: DistillPair) -> FrozenSet[str]:
        return frozenset({"features" if cfg.DISTILL.Toy.COLOUR == "red" else "roi_predictions"})

    cls = register(requires=staticmethod(requires))
    pair = make_pair(RETINANET, RETINANET, SAME_CLASSES)
    assert type(build_head("Toy", load_config(), pair)) is cls
    blue = load_config(opts=["DISTILL.Toy.COLOUR", "blue"])
    assert requires_of(cls, blue, pair) == {"roi_predictions"}
    text = refusal_of("Toy", blue, pair)
    assert "Toy needs roi_predictions; the student RetinaNet has none." in text


def test_head_may_refuse_a_pair_in_words_of_its_own(register: Callable) -> None:
    def requires(cfg: CfgNode, pair: DistillPair) -> FrozenSet[str]:
        raise ValueError(f"Toy does not like {pair.teacher.name}")

    register(requires=staticmethod(requires))
    with pytest.raises(ValueError, match="Toy does not like RetinaNet"):
        build_head("Toy", load_config(), make_pair(FASTER_RCNN, RETINANET, SAME_CLASSES))


@pytest.mark.parametrize("name, expected", [("MGD", {"features"}), ("PKD", {"features"})])
def test_heads_that_read_features_need_nothing_else_of_any_pair(name: str, expected: Set) -> None:
    for student, teacher in ((RETINANET, FASTER_RCNN), (FASTER_RCNN, FASTER_RCNN)):
        pair = make_pair(student, teacher, SAME_CLASSES)
        assert requires_of(head_class(name), load_config(), pair) == expected


def test_masked_logits_need_what_tells_the_classes_apart() -> None:
    of_regions = {"regions", "roi_predictions"}
    for detector, requires in ((RETINANET, {"dense"}), (FASTER_RCNN, of_regions)):
        pair = make_pair(detector, detector, SAME_CLASSES)
        assert requires_of(head_class("MLD"), load_config(), pair) == {"features"} | requires


OF_KIND = {
    "dense -> dense": (RETINANET, RETINANET),
    "dense -> two-stage": (FASTER_RCNN, RETINANET),
    "two-stage -> dense": (RETINANET, FASTER_RCNN),
    "two-stage -> two-stage": (FASTER_RCNN, FASTER_RCNN),
}


@pytest.mark.parametrize("kind", OF_KIND)
@pytest.mark.parametrize("pairs", [DENSE, TWO_STAGE, SAME_KIND, ANY_PAIR])
def test_head_is_built_for_the_kinds_of_pairs_it_takes_and_refused_by_name_for_others(
    register: Callable, pairs: FrozenSet[str], kind: str
) -> None:
    cls = register(pairs=pairs)
    student, teacher = OF_KIND[kind]
    pair = make_pair(student, teacher, SAME_CLASSES)
    assert pair.kind == kind
    if kind in pairs:
        assert type(build_head("Toy", load_config(), pair)) is cls
        return
    text = refusal_of("Toy", load_config(), pair)
    names = f"teacher {teacher['name']}, student {student['name']}"
    assert f"Toy takes {', '.join(sorted(pairs))}; this is {kind} ({names})." in text


def test_kinds_of_pairs_are_all_there_are() -> None:
    assert set(OF_KIND) == ANY_PAIR and DENSE | TWO_STAGE == SAME_KIND < ANY_PAIR
    assert DENSE == {"dense -> dense"} and TWO_STAGE == {"two-stage -> two-stage"}


def test_different_anchors_are_refused_where_cells_are_compared_only(register: Callable) -> None:
    register(requires_logits=True)
    other = {**RETINANET, "num_anchors": 1}
    text = refusal_of("Toy", load_config(), make_pair(RETINANET, other, SAME_CLASSES))
    assert "student has 9 anchors per cell and the teacher 1 (MODEL.ANCHOR_GENERATOR)" in text
    for student, teacher in ((FASTER_RCNN, {**FASTER_RCNN, "num_anchors": 15}), (other, other)):
        assert build_head("Toy", load_config(), make_pair(student, teacher, SAME_CLASSES))


def test_different_classes_are_refused_for_a_head_that_compares_logits(register: Callable) -> None:
    register(requires_logits=True)
    different = make_pair(RETINANET, RETINANET, {"student": 3, "teacher": 80})
    with pytest.raises(ValueError, match="Toy .*student has 3 classes and the teacher 80"):
        build_head("Toy", load_config(), different)
    assert build_head("Toy", load_config(), make_pair(RETINANET, RETINANET, SAME_CLASSES))


@pytest.mark.parametrize("name", ["MGD", "PKD"])
def test_different_classes_do_not_matter_to_a_head_that_reads_features(name: str) -> None:
    pair = make_pair(RETINANET, FASTER_RCNN, {"student": 3, "teacher": 80})
    assert [p.student for p in build_head(name, load_config(), pair).levels] == ["p3"]


def test_keys_reach_the_head() -> None:
    pair = make_pair(RETINANET, RETINANET, SAME_CLASSES)
    head = build_head("MGD", load_config(opts=["DISTILL.MGD.MASK_RATIO", 0.45]), pair)
    assert head.mask_ratio == 0.45


@pytest.mark.parametrize("mask_ratio", [-0.1, 1.0])
def test_mask_ratio_outside_its_range_is_refused_by_its_key(mask_ratio: float) -> None:
    cfg = load_config(opts=["DISTILL.MGD.MASK_RATIO", mask_ratio])
    with pytest.raises(ValueError, match=rf"DISTILL\.MGD\.MASK_RATIO .* got {mask_ratio}"):
        build_head("MGD", cfg, make_pair(RETINANET, RETINANET, SAME_CLASSES))


def test_head_of_a_user_that_cannot_be_asked_does_not_hide_why_another_is_refused(
    register: Callable,
) -> None:
    # A plain constructor, without from_config: it can be built, but not be listed as fitting.
    register(from_config=property(lambda self: None))
    pair = make_pair(RETINANET, RETINANET, SAME_CLASSES)
    with pytest.raises(ValueError, match="DKD takes two-stage -> two-stage.*Heads that fit: .*PKD"):
        build_head("DKD", load_config(), pair)


def test_requires_of_another_signature_is_told(register: Callable) -> None:
    register(requires=staticmethod(lambda pair: frozenset({"features"})))
    pair = make_pair(RETINANET, RETINANET, SAME_CLASSES)
    with pytest.raises(
        ValueError, match=r"ToyHead.requires must be .* static method of \(cfg, pair"
    ):
        build_head("Toy", load_config(), pair)
