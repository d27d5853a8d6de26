"""A checkpoint of half the size; one that is replaced is not lost."""

import errno
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Callable

import pytest
import torch


def test_full_disk_leaves_the_checkpoint_that_was_to_be_replaced(
    tool: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "model.pth")
    weight = torch.rand(3)
    torch.save({"model": {"weight": weight}}, path)
    shrink = tool("shrink_checkpoint").shrink

    def save(content: Any, file: IO) -> None:
        with open(file, "wb") if isinstance(file, str) else file as opened:
            opened.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(torch, "save", save)
        with pytest.raises(OSError):
            shrink(path, path)
    assert torch.equal(torch.load(path, weights_only=True)["model"]["weight"], weight)
    shrink(path, path)
    assert torch.equal(torch.load(path, weights_only=True)["model"]["weight"], weight.half())
