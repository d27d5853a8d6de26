"""gather_rows among two processes that have different numbers of rows."""

from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
from torch import Tensor

from detectron2.utils import comm

from d2kd.utils.processes import gather_rows
from tests.helpers.forks import launch_two

needs_distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="no torch.distributed"
)
COUNTS = [[3, 1], [1, 3], [0, 2], [2, 0], [2, 2], [0, 0]]
CHANNELS = 2


def rows_of(rank: int, count: int) -> Tensor:
    """Told apart by their numbers: 100 x rank + 10 x row + column."""
    rows = torch.arange(count)[:, None] * 10 + torch.arange(CHANNELS)
    return (rows + 100 * rank).float()


def in_each_process(folder: Path) -> None:
    """All that is done with two processes; what they found is left in files."""
    rank, found = comm.get_rank(), []
    for counts in map(torch.tensor, COUNTS):
        x = rows_of(rank, counts[rank]).requires_grad_()
        whole = gather_rows(rows_of(rank, counts[rank]).long(), counts)
        found.append({"rows": gather_rows(x, counts), "integers": whole})
    with pytest.raises(AssertionError) as error:
        # Every process, so that none waits for another.
        gather_rows(rows_of(rank, 1), torch.tensor([2, 2]))
    torch.save({"found": found, "error": str(error.value)}, folder / f"gathered_{rank}.pth")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> List[Dict[str, Any]]:
    launch_two(in_each_process, folder)
    return [torch.load(folder / f"gathered_{i}.pth") for i in range(2)]


@needs_distributed
@pytest.mark.process
@pytest.mark.parametrize("i", range(len(COUNTS)), ids=str)
def test_all_processes_get_the_rows_of_all_in_the_order_of_ranks(
    i: int, ranks: List[Dict[str, Any]]
) -> None:
    expected = torch.cat([rows_of(rank, count) for rank, count in enumerate(COUNTS[i])])
    for found in ranks:
        assert torch.equal(found["found"][i]["rows"], expected)
        assert not found["found"][i]["rows"].requires_grad
        assert torch.equal(found["found"][i]["integers"], expected.long()), "of any type"


@needs_distributed
@pytest.mark.process
def test_number_of_rows_that_is_not_the_announced_one_is_refused(
    ranks: List[Dict[str, Any]],
) -> None:
    for rank, found in enumerate(ranks):
        assert f"1 rows, but counts are [2, 2] and this is rank {rank}" in found["error"]


@pytest.mark.parametrize("count", [0, 3])
def test_single_process_has_all_rows_already(count: int) -> None:
    x = rows_of(0, count).requires_grad_()
    found = gather_rows(x, torch.tensor([count]))
    assert torch.equal(found, x) and not found.requires_grad
