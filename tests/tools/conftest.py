"""What the tests of tools share."""

import argparse
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Iterator, List

import pytest
import torch

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from tests.helpers.toys import detector_config, distill_config, stock_backbone


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a file of tools by name, so that the processes that --memory starts can do it too."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    return importlib.import_module


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[[str, str], str]:
    """Writes a distillation YAML of two toy detectors, with the heads MGD and PKD."""

    def write(student: str, teacher: str) -> str:
        teacher_file, path = tmp_path / "teacher.yaml", tmp_path / "distill.yaml"
        teacher_file.write_text(detector_config(teacher, **stock_backbone(teacher)).dump())
        opts = ["DISTILL.TEACHER.CONFIG_FILE", str(teacher_file)]
        cfg = distill_config(student, opts, ["MGD", "PKD"], **stock_backbone(student))
        path.write_text(cfg.dump())
        return str(path)

    return write


@pytest.fixture
def small() -> List[str]:
    """Words for a benchmark of two rounds on two small images."""
    words = "--size 64x96 --rounds 2 --warmup 1 --device cpu --threads 1"
    return words.split()


@pytest.fixture
def small_args(
    tool: Callable[[str], ModuleType], small: List[str]
) -> Callable[..., argparse.Namespace]:
    return lambda *words: tool("benchmark").parse_args([*small, *words])


@pytest.fixture
def head_alone(
    tool: Callable[[str], ModuleType],
    small_args: Callable[..., argparse.Namespace],
    config_file: Callable[[str, str], str],
) -> Iterator[Callable[..., Any]]:
    """Builds a HeadAlone of two toy detectors: student, teacher, head, KEY, VALUE, ..."""
    parts = tool("benchmark_parts")

    def build(student: str, teacher: str, name: str, *opts: str) -> Any:
        path = config_file(student, teacher)
        args = small_args("--config-file", path, "--heads", name, *opts)
        cfg = parts.build_config(args, "")
        torch.manual_seed(0)
        whole = build_model(cfg).train()
        parts.calm(whole)
        batch = parts.random_batch(whole.student, args)
        alone = parts.HeadAlone(cfg, parts.with_heads(cfg, whole, [name]), batch)
        alone.whole_step = lambda: whole(batch)  # of the same detectors and the same head
        return alone

    with EventStorage():
        yield build
