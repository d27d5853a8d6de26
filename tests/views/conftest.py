from typing import Iterator

import pytest

from detectron2.utils.events import EventStorage


@pytest.fixture(autouse=True)
def storage() -> Iterator[EventStorage]:
    with EventStorage() as storage:  # Detectron2's losses write to it
        yield storage
