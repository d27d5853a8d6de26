"""A test set's class i must be the class i that the training sets teach."""

from pathlib import Path
from typing import Callable, List

import pytest

from d2kd.data import register_datasets

from toy_sets import Content, config_of, write_set


def classes(*names: str, ids: List[int] = None) -> Callable[[Content], None]:
    """Gives the JSON these categories. Annotations keep to those that are there."""

    def apply(said: Content) -> None:
        numbers = ids or range(1, len(names) + 1)
        said["categories"] = [{"id": i, "name": x} for i, x in zip(numbers, names)]
        for annotation in said["annotations"]:
            annotation["category_id"] = said["categories"][0]["id"]

    return apply


OTHERS = [
    (classes("dog", "cat"), 'the ids in its "categories" so that the order is'),
    (classes("cat", "dog", ids=[2, 1]), 'the ids in its "categories" so that the order is'),
    (classes("cat"), 'Add dog to its "categories", with the ids that they have there'),
    (classes("dog"), 'Add cat to its "categories"'),
    (classes("cat", "dog", "ape"), 'Remove ape from its "categories" and "annotations"'),
    (classes("cat", "ape"), "If ape here is dog there, use one name in both"),
]


@pytest.mark.parametrize("change, advice", OTHERS, ids=[x[1][:30] for x in OTHERS])
@pytest.mark.parametrize("part", ["TRAIN", "TEST"])
@pytest.mark.parametrize("alone", [False, True])
def test_other_classes_are_refused_with_both_lists_and_what_would_be_right(
    alone: bool, part: str, change: Callable, advice: str, tmp_path: Path, forget_sets: None
) -> None:
    write_set(tmp_path, "train")
    write_set(tmp_path, "other", change)
    sets = (["train", "other"], []) if part == "TRAIN" else (["train"], ["other"])
    cfg = config_of(tmp_path, *sets)
    if alone and part == "TRAIN":
        return
    with pytest.raises(ValueError, match=r"(?s)set other has .*but train, .*\(cat, dog\)") as error:
        register_datasets(cfg, parts=("TEST",) if alone else ("TRAIN", "TEST"))
    assert advice in str(error.value) and "NUM_CLASSES" not in str(error.value)


@pytest.mark.parametrize(
    "change", [classes("cat", "dog", ids=[0, 1]), classes("cat", "dog", ids=[7, 90])]
)
def test_ids_may_differ_where_the_order_is_the_same(
    change: Callable, tmp_path: Path, forget_sets: None
) -> None:
    write_set(tmp_path, "train")
    write_set(tmp_path, "val", change)
    register_datasets(config_of(tmp_path, ["train"], ["val"]))


def test_following_the_advice_for_fewer_classes_leads_out(
    tmp_path: Path, forget_sets: None
) -> None:
    write_set(tmp_path, "train")
    write_set(tmp_path, "val", classes("dog", ids=[2]))
    with pytest.raises(ValueError, match='Add cat to its "categories"'):
        register_datasets(config_of(tmp_path, ["train"], ["val"]))

    def advised(said: Content) -> None:
        for annotation in said["annotations"]:
            annotation["category_id"] = 2  # no cat is there

    write_set(tmp_path, "val_all", advised)
    register_datasets(config_of(tmp_path, ["train"], ["val_all"]))


def test_other_spelling_is_told(
    tmp_path: Path, forget_sets: None, caplog: pytest.LogCaptureFixture
) -> None:
    write_set(tmp_path, "train")
    write_set(tmp_path, "val", classes("Cat", "dog "))
    register_datasets(config_of(tmp_path, ["train"], ["val"]))
    assert "val spells its classes differently from train: Cat, dog ; cat, dog." in caplog.text


def test_number_of_classes_is_the_training_set_s_where_it_is_known(
    tmp_path: Path, forget_sets: None
) -> None:
    write_set(tmp_path, "train")
    write_set(tmp_path, "val", classes("cat"))
    cfg = config_of(tmp_path, ["train"], ["val"])
    cfg.MODEL.RETINANET.NUM_CLASSES = 3
    with pytest.raises(ValueError, match="NUM_CLASSES is 3, but data set train has 2 .* to 2 or"):
        register_datasets(cfg)
    # Evaluated alone, the set of 2 classes cannot be what a detector of 3 was trained on.
    with pytest.raises(ValueError, match="data set val has 1 .*trained with 3 classes needs"):
        register_datasets(cfg, parts=("TEST",))


def test_evaluation_does_not_ask_for_the_training_set(tmp_path: Path, forget_sets: None) -> None:
    write_set(tmp_path, "val")
    cfg = config_of(tmp_path, ["train"], ["val"])
    register_datasets(cfg, parts=("TEST",))
    (tmp_path / "train.json").write_text("{")
    register_datasets(cfg, parts=("TEST",))


def test_built_in_shapes_and_a_set_of_other_classes(tmp_path: Path, forget_sets: None) -> None:
    write_set(tmp_path, "val", classes("star", "disc", "ring", "triangle", "square", "cross"))
    cfg = config_of(tmp_path, [], ["val"])
    cfg.DATASETS.TRAIN, cfg.MODEL.RETINANET.NUM_CLASSES = ("d2kd_shapes_train",), 6
    cfg.DATASETS.SHAPES.ROOT, before = str(tmp_path), sorted(tmp_path.iterdir())
    for options in ({"draw": False}, {"parts": ("TEST",)}):
        with pytest.raises(ValueError, match="set val has 6 .*but d2kd_shapes_train"):
            register_datasets(cfg, **options)
    assert sorted(tmp_path.iterdir()) == before
