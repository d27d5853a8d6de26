"""
Tests on a GPU: `pytest tests/gpu`, skipped where PyTorch sees none.

Not run on a GPU yet. tests/test_gpu_rehearsal.py runs them on the CPU, on a pretended GPU: with
D2KD_PRETEND_GPU=1 PYTORCH_JIT=0 in the environment they are run so by hand, too.
"""

import os
from pathlib import Path
from typing import Iterator, List, Optional

import pytest
import torch

from tests.helpers.pretended_cuda import PretendedCuda

PRETEND = "D2KD_PRETEND_GPU" in os.environ


def pytest_collection_modifyitems(items: List[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not (PRETEND or torch.cuda.is_available()):
                item.add_marker(pytest.mark.skip(reason="PyTorch sees no GPU"))


@pytest.fixture(autouse=True)
def pretended() -> Iterator[Optional[PretendedCuda]]:
    """The pretended GPU; None on a true one."""
    if PRETEND:
        with PretendedCuda() as gpu:
            yield gpu
        return
    # TensorFloat-32 has 10 bits: too few to compare with the CPU.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield None
