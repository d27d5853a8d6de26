"""What is read from a checkpoint while its checksums are compared."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from d2kd.weights.verify import read_verified

VALUES = {"iteration": 3, "text": "ä", "set": {1}, "bytes": b"\x00\xff", "float": 0.5, "none": None}


def test_values_are_read_and_every_kind_of_tensor_is_left_out(tmp_path: Path) -> None:
    tensors = [torch.zeros(3, dtype=x) for x in (torch.half, torch.bfloat16, torch.int64)]
    tensors += [nn.Parameter(torch.ones(2)), torch.ones(4, 4).t()[1:], torch.ones(3).bool()]
    model = nn.BatchNorm1d(2).state_dict()  # with PyTorch's "_metadata"
    other = [torch.Size([2]), torch.float32, torch.device("cpu")]
    content = {"trainer": VALUES, "model": model, "tensors": tensors, "other": other}
    torch.save(content, tmp_path / "x.pth")
    found = read_verified(str(tmp_path / "x.pth"))
    assert found["trainer"] == VALUES
    assert list(found["model"]) == list(model) and len(found["tensors"]) == len(tensors)
    tree = [*found["model"].values(), *found["tensors"]]
    assert not any(isinstance(x, torch.Tensor) for x in tree)
    assert torch.load(tmp_path / "x.pth", weights_only=True)["trainer"] == VALUES


class Evil:
    def __reduce__(self) -> Any:
        return print, ("run",)


@pytest.mark.parametrize("content, named", [(Evil(), "print"), (nn.Linear(1, 1), "a whole model")])
def test_nothing_that_a_file_names_is_run(
    content: Any, named: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.save({"x": content}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=named):
        read_verified(str(tmp_path / "x.pth"))
    assert not capsys.readouterr().out
