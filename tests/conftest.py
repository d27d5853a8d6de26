"""Runs before any test module is imported."""

import gc
import os
from functools import partial
from pathlib import Path
from typing import Any, Iterator, List

import pytest
import yaml

# The detectors here are too small to share among threads, which would only wait for each other;
# also for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Every run writes its config, several times. Where PyYAML has libyaml, that writes the same text.
yaml.safe_dump = partial(yaml.dump, Dumper=getattr(yaml, "CSafeDumper", yaml.SafeDumper))


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking through all that was imported, again and again."""
    gc.freeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared by the runs of a test module."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def teacher(folder: Path) -> List[Any]:
    """DISTILL.TEACHER.* of a RetinaNet with wider levels than the toy students have."""
    from tests.helpers.toys import write_teacher

    return write_teacher(folder, "retinanet", MODEL__FPN__OUT_CHANNELS=64)


@pytest.fixture
def forget_sets() -> Iterator[None]:
    """The names of data sets that the test registers are free again after it."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)
