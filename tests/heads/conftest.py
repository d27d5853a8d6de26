from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, List

import pytest

from tests.helpers.toys import write_teacher


@pytest.fixture(scope="module")
def teacher_of(folder: Path) -> Callable[[str], List[Any]]:
    """DISTILL.TEACHER.* of a toy detector by name, with wider levels than the students have."""
    return lru_cache(maxsize=None)(
        lambda name: write_teacher(folder, name, MODEL__FPN__OUT_CHANNELS=64)
    )
