"""Which class of a teacher is which of its student's, and where the names come from."""

import json
import random
from pathlib import Path
from typing import Any, Dict, List, Sequence, Set, Tuple

import pytest

from detectron2 import config as detectron2_config
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from d2kd import build_teacher
from d2kd.data import class_names
from d2kd.data.class_names import names_in_sets
from d2kd.data.outlines import CLASSES
from d2kd.pairing.classes import CommonClasses, common_classes, match_classes

from toys import detector_config, distill_config, write_teacher

SHAPES = tuple(CLASSES)  # disc, ring, triangle, square, star, cross
Pairs = List[Tuple[Set[str], Set[str]]]


def pairs_of(found: CommonClasses) -> Pairs:
    """The groups by name."""
    return [
        ({found.student_names[i] for i in ours}, {found.teacher_names[i] for i in theirs})
        for ours, theirs in zip(found.student, found.teacher)
    ]


def pairs(student: str, teacher: str, *aliases: str) -> Pairs:
    """
    Match classes whose names are letters.

    Args:
        aliases: two letters each, student's and teacher's; "-" is ""
    """
    split = [[x.replace("-", "") for x in alias] for alias in aliases]
    return pairs_of(match_classes(student, teacher, split))


# Matching ----------------------------------------------------------------------------------------


def test_equal_names_are_the_same_class_wherever_they_stand() -> None:
    assert pairs("abc", "abc") == [({"a"}, {"a"}), ({"b"}, {"b"}), ({"c"}, {"c"})]
    found = match_classes("abc", "dcxa")
    # In the student's order: a is its 0 and the teacher's 3, c is 2 and 1.
    assert (found.student, found.teacher) == (((0,), (2,)), ((3,), (1,)))
    assert (found.student_names, found.teacher_names) == (tuple("abc"), tuple("dcxa"))


@pytest.mark.parametrize(
    "aliases, expected",
    [
        (["ax"], [("a", "x")]),
        (["ax", "by"], [("a", "x"), ("b", "y")]),
        (["ay", "bx"], [("a", "y"), ("b", "x")]),
        (["ax", "ay"], [("a", "xy")]),
        (["ax", "bx"], [("ab", "x")]),
        # a - x - b - y are one chain; c - z is not in it.
        (["ax", "bx", "by", "cz"], [("ab", "xy"), ("c", "z")]),
        # Two chains that the last alias joins: a - x, b - y, then b - x.
        (["ax", "by", "bx"], [("ab", "xy")]),
        (["ax", "by", "cz", "ay", "bz"], [("abc", "xyz")]),
        (["ax", "ax"], [("a", "x")]),
        ([], []),
    ],
)
def test_aliases_join_all_that_they_connect(
    aliases: List[str], expected: List[Tuple[str, str]]
) -> None:
    assert pairs("abc", "xyz", *aliases) == [(set(s), set(t)) for s, t in expected]


def test_class_of_an_alias_has_no_equal_beside_it() -> None:
    # The teacher's b is the student's a: the student's own b is left alone, and so is the
    # teacher's a.
    assert pairs("abc", "abc", "ab") == [({"a"}, {"b"}), ({"c"}, {"c"})]
    assert pairs("abc", "abc", "ab", "aa") == [({"a"}, {"a", "b"}), ({"c"}, {"c"})]
    assert pairs("abc", "abc", "ab", "bb") == [({"a", "b"}, {"b"}), ({"c"}, {"c"})]
    assert pairs("ab", "ab", "ab", "ba") == [({"a"}, {"b"}), ({"b"}, {"a"})]


@pytest.mark.parametrize("alias", ["a-", "-a"])
def test_alias_without_a_partner_takes_a_class_away(alias: str) -> None:
    assert pairs("abc", "abc", alias) == [({"b"}, {"b"}), ({"c"}, {"c"})]
    assert pairs("a", "a", alias) == []
    # One that has a partner elsewhere keeps that.
    assert pairs("ab", "ab", alias, "aa") == [({"a"}, {"a"}), ({"b"}, {"b"})]


@pytest.mark.parametrize(
    "student, teacher, text",
    [
        ("cat dog cat", "dog cat", "student's classes 0, 2 are all named 'cat'"),
        ("cat dog", "cat dog cat", "teacher's classes 0, 2 .* in DISTILL.TEACHER.CLASSES"),
        ("cat dog cat", "cat cat dog", "student's classes 0, 2 .* in the data set's categories"),
    ],
)
def test_name_that_two_classes_have_is_refused_where_names_decide(
    student: str, teacher: str, text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        match_classes(student.split(), teacher.split())
    assert match_classes(student.split(), student.split()).same


def connected(student: Sequence[str], teacher: Sequence[str], links: Set[Tuple[str, str]]) -> Pairs:
    """Components of the graph of links, found by walking from each of the student's classes."""
    found: Pairs = []
    for start in student:
        ours, theirs = {start}, set()
        for _ in range(len(student) + len(teacher)):  # no walk is longer
            theirs |= {t for s, t in links if s in ours}
            ours |= {s for s, t in links if t in theirs}
        if theirs and (ours, theirs) not in found:
            found.append((ours, theirs))
    return found


def test_groups_are_the_components_of_the_graph_of_names() -> None:
    rng = random.Random(0)
    sizes = set()
    for _ in range(200):
        student, teacher = (rng.sample("abcdef", rng.randint(1, 6)) for _ in range(2))
        aliases = [
            [rng.choice(student), rng.choice([*teacher, ""])] for _ in range(rng.randint(0, 4))
        ]
        named = {x for x, _ in aliases}, {x for _, x in aliases}
        links = {(s, t) for s, t in aliases if t}
        links |= {
            (x, x) for x in {*student} & {*teacher} if x not in named[0] and x not in named[1]
        }
        found = match_classes(student, teacher, aliases)
        assert pairs_of(found) == connected(student, teacher, links)
        for groups in (found.student, found.teacher):
            members = [i for group in groups for i in group]
            assert len(set(members)) == len(members) and all(groups)
        sizes |= {(len(s), len(t)) for s, t in pairs_of(found)}
    assert {(1, 1), (2, 1), (1, 2), (2, 2)} <= sizes


@pytest.mark.parametrize(
    "student, teacher, aliases, same",
    [
        ("abc", "abc", [], True),
        ("abc", "xyz", ["ax", "by", "cz"], True),
        ("abc", "acb", [], False),
        ("abc", "abcd", [], False),
        ("abcd", "abc", [], False),
        ("abc", "abc", ["a-"], False),
        ("ab", "ab", ["aa", "ab", "bb"], False),
        ("abc", "xyz", [], False),
        ("abc", "bca", ["ab", "bc", "ca"], True),  # other names, the same order
    ],
)
def test_same_is_said_of_equal_classes_in_equal_order_alone(
    student: str, teacher: str, aliases: List[str], same: bool
) -> None:
    split = [[x.replace("-", "") for x in alias] for alias in aliases]
    assert match_classes(student, teacher, split).same is same


# What is printed ---------------------------------------------------------------------------------


def test_map_is_printed_with_what_either_knows_alone() -> None:
    found = match_classes(
        ["car", "van", "cat", "tree"], ["cat", "vehicle", "dog", "puma"], [["car", "vehicle"]]
    )
    assert str(found).splitlines() == [
        "  car <- vehicle",
        "  cat <- cat",
        "  only in the student: van, tree",
        "  only in the teacher: dog, puma",
    ]
    joined = match_classes(["car", "van"], ["bus", "lorry"], [["car", "bus"], ["van", "bus"]])
    assert str(joined).splitlines() == ["  car, van <- bus", "  only in the teacher: lorry"]


def test_equal_classes_are_printed_in_a_line() -> None:
    assert str(match_classes("abc", "abc")) == "  both have the same 3 classes, in the same order"


def test_same_classes_of_other_names_are_printed() -> None:
    # The user has said that they are the same, and sees what was said.
    found = match_classes(["cat", "dog"], ["chat", "chien"], [["cat", "chat"], ["dog", "chien"]])
    assert found.same and str(found).splitlines() == ["  cat <- chat", "  dog <- chien"]


def test_nearly_equal_names_are_suggested_as_aliases() -> None:
    found = match_classes(
        ["person", "traffic light", "motorbike", "cat"],
        ["Person", "traffic_light", "zebra", "cat"],
    )
    last = str(found).splitlines()[-1]
    suggested = [["person", "Person"], ["traffic light", "traffic_light"]]
    assert last == f"  similar names, possibly DISTILL.TEACHER.ALIASES: {suggested}"
    # They are what can be given.
    found = match_classes(found.student_names, found.teacher_names, suggested)
    assert "ALIASES" not in str(found) and len(found.student) == 3


def test_class_that_has_a_partner_is_not_suggested() -> None:
    assert "ALIASES" not in str(match_classes(["horse", "horses"], ["horse", "zebra"]))
    found = match_classes(["horse", "horses"], ["horse", "HORSES"])
    assert str(found).splitlines()[-1].endswith("ALIASES: [['horses', 'HORSES']]")


# From a run's config -----------------------------------------------------------------------------


def config(train: Sequence[str] = ("d2kd_shapes_train",), **teacher: Any) -> CfgNode:
    cfg = detector_config("retinanet")
    cfg.DATASETS.TRAIN = tuple(train)
    for key, value in teacher.items():
        cfg.DISTILL.TEACHER[key] = value
    return cfg


def test_names_are_those_of_the_run_s_data_and_of_the_teacher_s_config() -> None:
    found = common_classes(config(), 6, 3, ("star", "disc", "dog"))
    assert found == match_classes(SHAPES, ("star", "disc", "dog"))
    assert pairs_of(found) == [({"disc"}, {"disc"}), ({"star"}, {"star"})]


def test_named_classes_replace_those_of_the_teacher_s_config(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cfg = config(CLASSES=["ring", "disk"], ALIASES=[["disc", "disk"]])
    for unread in ((), ("star", "disc"), ("one", "two", "three")):
        found = common_classes(cfg, 6, 2, unread)
        assert pairs_of(found) == [({"disc"}, {"disk"}), ({"ring"}, {"ring"})]
    assert not caplog.messages


@pytest.mark.parametrize("train, names", [((), SHAPES), (("d2kd_shapes_train",), ()), ((), ())])
def test_without_the_names_of_either_there_is_no_map(
    train: Sequence[str], names: Sequence[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert common_classes(config(train), 6, 6, names) is None
    assert not caplog.messages


def test_data_of_another_number_of_classes_does_not_name_the_detector_s(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert common_classes(config(), 6, 3, SHAPES) is None
    assert "teacher's config has 6 classes, but the teacher has 3" in caplog.text
    assert "DISTILL.TEACHER.CLASSES" in caplog.text, "where to name them"
    caplog.clear()
    assert common_classes(config(), 5, 6, SHAPES) is None
    assert "student's config has 6 classes, but the student has 5" in caplog.text


# Refusals ----------------------------------------------------------------------------------------


def refusal(num_teacher: int = 6, names: Sequence[str] = SHAPES, **teacher: Any) -> str:
    with pytest.raises(ValueError) as error:
        common_classes(config(**teacher), 6, num_teacher, names)
    return str(error.value)


@pytest.mark.parametrize(
    "classes, told",
    [
        (["disc", "ring"], "got 2: ['disc', 'ring']"),
        (["disc", "ring", "star", "dog"], "got 4: "),
        (["disc", "", "star"], "got '' in ['disc', '', 'star']"),
        (["disc", True, "star"], "got True in ['disc', True, 'star']"),  # YAML's yes
    ],
)
def test_classes_that_do_not_name_every_class_are_refused(classes: List[Any], told: str) -> None:
    text = refusal(num_teacher=3, names=(), CLASSES=classes)
    assert text.startswith("DISTILL.TEACHER.CLASSES must name each of the teacher's 3 classes, ")
    assert told in text


@pytest.mark.parametrize(
    "alias",
    [["disc"], ["disc", "ring", "star"], "disc", "ab", ["disc", 3], ["", ""], [None, "disc"], []],
)
def test_alias_that_is_no_pair_is_refused(alias: Any) -> None:
    text = refusal(ALIASES=[["disc", "ring"], alias])
    assert f"DISTILL.TEACHER.ALIASES has the entry {alias!r}" in text
    assert "each must be [student's class, teacher's class]" in text


@pytest.mark.parametrize(
    "alias, told",
    [
        (["disk", "disc"], "the student has no class 'disk'. Did you mean 'disc'?"),
        (["disc", "sqare"], "the teacher has no class 'sqare'. Did you mean 'square'?"),
        (["", "dog"], "the teacher has no class 'dog'. It has disc, ring, triangle, square, "),
        (["DISC", ""], "the student has no class 'DISC'. Did you mean 'disc'?"),
        (["elephant", ""], "the student has no class 'elephant'. It has disc, ring, "),
    ],
)
def test_alias_of_an_unknown_class_is_refused_with_what_is_known(
    alias: List[str], told: str
) -> None:
    assert f"ALIASES has the entry {alias!r}, but {told}" in refusal(ALIASES=[alias])


def test_alias_needs_names_on_both_sides() -> None:
    text = refusal(names=(), ALIASES=[["disc", "disk"]])
    assert text == (
        "DISTILL.TEACHER.ALIASES [['disc', 'disk']]: the names of the teacher's classes are "
        "unknown. Set DISTILL.TEACHER.CLASSES."
    )
    text = refusal(train=(), ALIASES=[["disc", "disk"]])
    assert text == (
        "DISTILL.TEACHER.ALIASES [['disc', 'disk']]: the names of the student's classes are "
        "unknown. They come from the data set in DATASETS.TRAIN."
    )


def test_names_of_the_teacher_alone_are_refused_as_there_is_nothing_to_match_them_with() -> None:
    text = refusal(num_teacher=2, names=(), train=(), CLASSES=["disc", "ring"])
    assert text == (
        "DISTILL.TEACHER.CLASSES ['disc', 'ring']: the names of the student's classes are "
        "unknown. They come from the data set in DATASETS.TRAIN."
    )


def test_nothing_in_common_is_refused_with_both_and_how_to_go_on() -> None:
    text = refusal(num_teacher=2, names=("dog", "Disc"))
    assert text.startswith("DISTILL.TEACHER: student and teacher have no class in common:\n")
    assert "only in the student: disc, ring, triangle, square, star, cross" in text
    assert "only in the teacher: dog, Disc" in text
    assert "similar names, possibly DISTILL.TEACHER.ALIASES: [['disc', 'Disc']]" in text
    assert "DISTILL.TEACHER.ALIASES, or" in text and "ALLOW_OTHER_CLASSES True" in text
    # Also where there would have been some.
    assert "no class in common" in refusal(ALIASES=[[x, ""] for x in SHAPES])


def test_nothing_in_common_may_be_allowed() -> None:
    found = common_classes(config(ALLOW_OTHER_CLASSES=True), 6, 2, ("dog", "cat"))
    assert (found.student, found.teacher, found.same) == ((), (), False)
    assert str(found).splitlines() == [
        f"  only in the student: {', '.join(SHAPES)}",
        "  only in the teacher: dog, cat",
    ]


# What the data sets tell -------------------------------------------------------------------------


def coco(*names: str) -> Dict[str, Any]:
    """COCO's JSON, whose ids run against the order of the names in the file."""
    categories = [{"id": 10 - i, "name": x} for i, x in enumerate(names)]
    images = [{"id": 1, "file_name": "a.png", "width": 8, "height": 8}]
    return {"images": images, "annotations": [], "categories": categories}


def with_coco(path: Path, *rest: str) -> CfgNode:
    cfg = config(["my_animals", *rest])
    entry = {"NAME": "my_animals", "JSON": str(path), "IMAGES": str(path.parent)}
    cfg.DATASETS.COCO_FORMAT = [entry]
    return cfg


def test_built_in_shapes_are_known_without_being_drawn(tmp_path: Path) -> None:
    cfg = config()
    cfg.DATASETS.SHAPES.ROOT = str(tmp_path)
    assert class_names(cfg) == SHAPES
    assert not list(tmp_path.iterdir())
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (), ("d2kd_shapes_val",)
    assert class_names(cfg) == SHAPES, "without a training set that of the test set"


def test_set_in_coco_s_format_names_its_classes_by_id_and_is_not_registered(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(coco("zebra", "ape", "cat")))
    cfg, before = with_coco(path), DatasetCatalog.list()
    assert class_names(cfg) == ("cat", "ape", "zebra")
    assert DatasetCatalog.list() == before


def test_set_whose_json_is_gone_leaves_it_to_the_next(tmp_path: Path) -> None:
    # The config of a teacher that was trained elsewhere names files of elsewhere.
    assert class_names(with_coco(tmp_path / "gone.json")) == ()
    assert class_names(with_coco(tmp_path / "gone.json", "d2kd_shapes_train")) == SHAPES


@pytest.mark.parametrize(
    "content, reason",
    [("{", "Expecting"), ('{"images": []}', '"annotations"'), ("[]", 'no list "images"')],
)
def test_json_that_is_none_of_coco_s_is_refused_by_its_path(
    tmp_path: Path, content: str, reason: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(ValueError) as error:
        class_names(with_coco(path))
    text = str(error.value)
    assert f"{path} is not in COCO's format: " in text and reason in text
    assert text.startswith("Data set my_animals: ") and text.count(str(path)) == 1


def test_entry_that_is_none_is_refused_by_its_key() -> None:
    cfg = config()
    cfg.DATASETS.COCO_FORMAT = [{"NAME": "a", "JSN": "b", "IMAGES": "c"}]
    with pytest.raises(ValueError, match=r"DATASETS\.COCO_FORMAT\[0\]: unknown key 'JSN'"):
        class_names(cfg)


def test_classes_of_detectron2_s_sets_are_known_without_a_file() -> None:
    names = names_in_sets(["coco_2017_train"])
    assert len(names) == 80 and names[0] == "person" and names[-1] == "toothbrush"
    assert len(names_in_sets(["voc_2007_trainval"])) == 20


def test_registered_set_is_read_where_detectron2_has_not_read_it(
    tmp_path: Path, forget_sets: None
) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(coco("dog", "cat")))
    register_coco_instances("my_registered", {}, str(path), str(tmp_path))
    assert names_in_sets(["my_registered"]) == ("cat", "dog")
    assert "thing_classes" not in MetadataCatalog.get("my_registered").as_dict()
    path.unlink()
    assert names_in_sets(["my_registered"]) == ()
    DatasetCatalog.register("my_own", list)
    assert names_in_sets(["my_own"]) == ()
    MetadataCatalog.get("my_own").set(thing_classes=["ape", "bee"])
    assert names_in_sets(["my_own"]) == ("ape", "bee")


def test_unregistered_set_is_unknown_and_stays_unregistered() -> None:
    assert names_in_sets(["nobody_s"]) == names_in_sets([]) == ()
    assert "nobody_s" not in MetadataCatalog.list()
    assert names_in_sets(["nobody_s", "d2kd_shapes_val"]) == SHAPES


# What the teacher's config tells -----------------------------------------------------------------

LAZY = """
from detectron2.config import LazyCall as L
from test_classes import tiny_retinanet

dataloader = dict(train=dict(dataset=dict(names={names!r}), mapper=dict(image_format="BGR")))
model = L(tiny_retinanet)(num_classes=6)
"""


def tiny_retinanet(num_classes: int) -> Any:
    from detectron2.modeling import build_model

    return build_model(detector_config("retinanet", MODEL__RETINANET__NUM_CLASSES=num_classes))


def test_teacher_s_yaml_tells_its_classes(tmp_path: Path) -> None:
    opts = write_teacher(tmp_path, "retinanet", DATASETS__TRAIN=("coco_2017_train",))
    cfg = distill_config("retinanet", opts)
    assert build_teacher(cfg).class_names == names_in_sets(["coco_2017_train"])
    cfg.DISTILL.TEACHER.OPTS = ["DATASETS.TRAIN", ("d2kd_shapes_train",)]
    assert build_teacher(cfg).class_names == SHAPES
    cfg.DISTILL.TEACHER.OPTS = ["DATASETS.TRAIN", ("nobody_s",)]
    assert build_teacher(cfg).class_names == ()


@pytest.mark.skipif(
    not hasattr(detectron2_config, "LazyConfig"), reason="this Detectron2 has no LazyConfig"
)
@pytest.mark.parametrize(
    "names, expected",
    [
        ("d2kd_shapes_train", SHAPES),
        (["nobody_s", "d2kd_shapes_val"], SHAPES),
        ("nobody_s", ()),
        (None, ()),
    ],
)
def test_teacher_s_lazy_config_tells_its_classes(
    tmp_path: Path, names: Any, expected: Sequence[str]
) -> None:
    path = tmp_path / "teacher.py"
    path.write_text(LAZY.format(names=names))
    cfg = distill_config("retinanet", ["DISTILL.TEACHER.CONFIG_FILE", str(path)])
    cfg.DISTILL.TEACHER.ALLOW_RANDOM_WEIGHTS = True
    assert build_teacher(cfg).class_names == tuple(expected)
