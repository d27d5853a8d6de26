"""A head's keys are its constructor's arguments: written, read and explained from there."""

from dataclasses import dataclass
from typing import Any, Dict, Sequence, Type

import pytest
import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec

from d2kd import DISTILL_HEAD_REGISTRY, load_config
from d2kd.heads import DetectorInfo, DistillPair, build_head
from d2kd.heads.__main__ import describe_keys, main
from d2kd.heads.keys import add_head_keys, head_arguments
from d2kd.heads.registry import head_class, head_names
from d2kd.pairing.levels import LevelPair, pair_levels
from d2kd.views import RegionSampler

SHAPES = {f"p{i}": ShapeSpec(channels=4, stride=2**i) for i in (3, 4)}
DETECTOR = DetectorInfo("Toy", SHAPES, num_classes=3, provides=frozenset({"features"}))
PAIR = DistillPair(DETECTOR, DETECTOR, pair_levels(SHAPES, SHAPES))


@dataclass(frozen=True)
class Part:
    """
    Attributes:
        size: of the part, above 0
    """

    size: int = 3

    def __post_init__(self) -> None:
        if self.size <= 0:
            raise ValueError(f"size must be above 0, got {self.size}.")


class KeyedHead(nn.Module):
    """
    A head written the short way.

    Attributes:
        loss_weight: what was published
    """

    loss_weight = 2.5
    sums_over_cells = True

    def __init__(
        self,
        *,
        levels: Sequence[LevelPair],
        sampler: RegionSampler,
        eps: float = 0.5,
        names: Sequence[str] = ("a", "b"),
        part: Part = Part(),
    ):
        """
        Args:
            levels: a fact
            sampler: another
            eps: below which nothing
                counts
            names: of things
            part: a node
        """
        super().__init__()
        if eps < 0:
            raise ValueError(f"eps must be 0 or above, got {eps}.")
        self.values = levels, sampler, eps, names, part

    def forward(self, student: Any, teacher: Any) -> Dict[str, Tensor]:
        return {"loss_keyed": torch.zeros(())}


class OldHead(nn.Module):
    """A head that says itself which keys it has and what it takes from them."""

    @configurable
    def __init__(self, *, levels: Sequence[LevelPair], sharpness: float):
        super().__init__()
        self.values = levels, sharpness

    @staticmethod
    def add_config(node: CfgNode) -> None:
        node.LOSS_WEIGHT = 4.0
        node.ALPHA = 2.0

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair) -> Dict[str, Any]:
        return {"levels": pair.levels, "sharpness": cfg.DISTILL.Old.ALPHA + 1}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    objects = dict(DISTILL_HEAD_REGISTRY._obj_map)
    monkeypatch.setattr(DISTILL_HEAD_REGISTRY, "_obj_map", objects)
    for head in (KeyedHead, OldHead):
        DISTILL_HEAD_REGISTRY.register(head)


def keys_of(head: Type[nn.Module]) -> CfgNode:
    node = CfgNode()
    add_head_keys(node, head)
    return node


def build(name: str, *opts: Any) -> nn.Module:
    return build_head(name, load_config(opts=list(opts)), PAIR)


def test_arguments_with_a_default_are_the_keys() -> None:
    node = keys_of(KeyedHead)
    assert node == {
        "LOSS_WEIGHT": 2.5,
        "REFERENCE_PIXELS": 0,
        "EPS": 0.5,
        "NAMES": ["a", "b"],
        "PART": {"SIZE": 3},
    }
    assert isinstance(node.NAMES, list) and isinstance(node.PART, CfgNode)


class OfTheDistiller(nn.Module):
    def __init__(self, *, levels: Sequence[LevelPair], schedule: str = "cosine"):
        """The node SCHEDULE would take its place."""


class WeighsItself(nn.Module):
    def __init__(self, *, levels: Sequence[LevelPair], loss_weight: float = 2.0):
        """As heads of other frameworks have it; the weight would be applied twice."""


class OneKeyForTwo(nn.Module):
    def __init__(self, *, levels: Sequence[LevelPair], t: float = 1.0, T: float = 4.0):
        """Both would be 4."""


class HasAClass(nn.Module):
    def __init__(self, *, levels: Sequence[LevelPair], activation: Any = nn.ReLU):
        """No YAML can name another one."""


class HasAPart(nn.Module):
    def __init__(self, *, levels: Sequence[LevelPair], part: Any = Part):
        """The class and not an instance."""


class HasADict(nn.Module):
    def __init__(self, *, levels: Sequence[LevelPair], weights: Any = {"p3": 1.0}):
        """Its keys could not be told from those of the config."""


@pytest.mark.parametrize(
    "head, message",
    [
        (OfTheDistiller, "'schedule' cannot be an argument: .*SCHEDULE is read by the Distiller"),
        (WeighsItself, "'loss_weight' cannot be an argument.*the class attribute loss_weight"),
        (OneKeyForTwo, "'t' and 'T' would be one key, .*T: rename one"),
        (HasAClass, "'activation' has the default .*ReLU.*, which is no value of a key, and DIST"),
        (HasAPart, "'part' has the default .*Part.*; an instance of a dataclass is a group"),
        (HasADict, "'weights' has the default .*p3.*A key is a number, a word"),
    ],
)
def test_argument_without_a_key_of_its_own_is_refused(head: Type[nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=f"{head.__name__}.__init__: {message}"):
        keys_of(head)


def test_a_whole_number_is_a_float_where_one_is_meant() -> None:
    class Whole(nn.Module):
        loss_weight = 2

        def __init__(self, *, levels: Sequence[LevelPair], t: float = 4, count: int = 3):
            """As one writes it; yacs would refuse 0.5 for the weight and for T."""

    node = keys_of(Whole)
    assert node == {"LOSS_WEIGHT": 2, "T": 4, "COUNT": 3}
    assert [type(node[k]) for k in ("LOSS_WEIGHT", "T", "COUNT")] == [float, float, int]


class WantsTooMuchHead(nn.Module):
    def __init__(self, *, levels: Sequence[LevelPair], temperature: float):
        """With a default it would be a key."""
        super().__init__()


class WantsMoreThanItTakesHead(WantsTooMuchHead):
    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair) -> Dict[str, Any]:
        return {"levels": pair.levels}


@pytest.mark.parametrize("head", [WantsTooMuchHead, WantsMoreThanItTakesHead])
def test_an_argument_that_nothing_gives_is_told_with_what_would(
    head: Type[nn.Module], registered: None
) -> None:
    DISTILL_HEAD_REGISTRY.register(head)
    name = head.__name__[: -len("Head")]
    message = rf"'temperature'\. With .* key DISTILL\.{name}\.TEMPERATURE"
    with pytest.raises(TypeError, match=message):
        build(name)


def test_class_without_a_head_s_name_is_not_registered(registered: None) -> None:
    with pytest.raises(ValueError, match='must be named CosineHead, which is "Cosine"'):
        DISTILL_HEAD_REGISTRY.register(type("Cosine", (nn.Module,), {}))
    assert "Cosine" not in DISTILL_HEAD_REGISTRY


def test_keys_and_facts_reach_the_constructor(registered: None) -> None:
    opts = ["DISTILL.Keyed.EPS", 0.25, "DISTILL.Keyed.NAMES", ["c"], "DISTILL.Keyed.PART.SIZE", 7]
    levels, sampler, eps, names, part = build("Keyed", *opts).values
    assert (levels, sampler) == (PAIR.levels, RegionSampler())
    assert (eps, names, part) == (0.25, ["c"], Part(7))


def test_facts_that_a_head_knows_better_win(registered: None) -> None:
    found = head_arguments(KeyedHead, load_config(), PAIR, levels=(), eps=9.0)
    assert found["levels"] == () and found["eps"] == 9.0 and found["part"] == Part()


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("EPS", -1.0, r"^DISTILL\.Keyed\.EPS must be 0 or above, got -1\.0"),
        ("PART.SIZE", 0, r"^DISTILL\.Keyed\.PART\.SIZE must be above 0, got 0"),
    ],
)
def test_a_refusal_begins_with_the_key(
    key: str, value: Any, message: str, registered: None
) -> None:
    with pytest.raises(ValueError, match=message):
        build("Keyed", f"DISTILL.Keyed.{key}", value)


def test_a_head_with_keys_and_from_config_of_its_own_goes_on_working(registered: None) -> None:
    assert keys_of(OldHead) == {"LOSS_WEIGHT": 4.0, "ALPHA": 2.0}
    assert build("Old", "DISTILL.Old.ALPHA", 5.0).values == (PAIR.levels, 6.0)
    assert "DISTILL.Old.ALPHA: 2.0" in describe_keys("Old")


def test_keys_are_printed_with_defaults_and_what_the_docstrings_say(
    registered: None, capsys: pytest.CaptureFixture
) -> None:
    main(["Keyed"])
    head, printed = (x.splitlines() for x in capsys.readouterr().out.split("\n\n"))
    assert head[0] == "Keyed" and head[1].startswith("    ")
    assert printed[0] == "DISTILL.Keyed.LOSS_WEIGHT: 2.5" and "published" in printed[1]
    where = printed.index("DISTILL.Keyed.EPS: 0.5")
    assert printed[where + 1] == "    below which nothing counts"
    where = printed.index("DISTILL.Keyed.PART.SIZE: 3")
    assert printed[where + 1] == "    a node; of the part, above 0"


def test_heads_are_listed_with_what_they_are(
    registered: None, capsys: pytest.CaptureFixture
) -> None:
    main([])
    printed = capsys.readouterr().out
    names = [x for x in printed.splitlines()[:-1] if x and not x.startswith("    ")]
    assert names == head_names() and "Old" in names, "also of users, also without a docstring"
    assert "\nPKD\n    Distillation by Pearson correlation, https://" in printed
    assert "DISTILL." not in printed.replace("DISTILL.STAGES", "")


def test_an_unknown_head_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'CrossKD'?"):
        main(["crosskd"])


@pytest.mark.parametrize("name", head_names())
def test_every_key_of_ours_is_explained(name: str) -> None:
    assert not hasattr(head_class(name), "add_config")
    lines = describe_keys(name).splitlines()
    for line, after in zip(lines, [*lines[1:], ""]):
        plain = line in (f"DISTILL.{name}.LOSS_WEIGHT: 1.0",)  # nothing was published
        assert plain or line.startswith("    ") or after.startswith("    "), line
