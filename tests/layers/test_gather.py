"""gather_rows among two processes that have different numbers of rows."""

from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch
from torch import Tensor

from detectron2.utils import comm

from d2kd.engine import launch
from d2kd.layers import gather_rows

needs_distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="no torch.distributed"
)
COUNTS = [[3, 1], [1, 3], [0, 2], [2, 0], [2, 2], [0, 0]]
CHANNELS = 2


def rows_of(rank: int, count: int) -> Tensor:
    """Told apart by their numbers: 100 x rank + 10 x row + column."""
    rows = torch.arange(count)[:, None] * 10 + torch.arange(CHANNELS)
    return (rows + 100 * rank).float()


def weights_of(counts: List[int]) -> Tensor:
    """Of a weighted sum of all gathered rows."""
    return 1.0 + torch.arange(sum(counts) * CHANNELS).view(-1, CHANNELS).float()


def in_each_process(folder: Path) -> None:
    """All that is done with two processes; what they found is left in files."""
    rank, found = comm.get_rank(), []
    for counts in COUNTS:
        x = rows_of(rank, counts[rank]).requires_grad_()
        gathered = gather_rows(x, counts)
        (gathered * weights_of(counts)).sum().backward()
        whole = gather_rows(rows_of(rank, counts[rank]).long(), counts)
        found.append({"rows": gathered.detach(), "gradient": x.grad, "integers": whole})
    with pytest.raises(AssertionError) as error:
        gather_rows(rows_of(rank, 1), [2, 2])  # every process, so that none waits for another
    torch.save({"found": found, "error": str(error.value)}, folder / f"gathered_{rank}.pth")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> List[Dict[str, Any]]:
    launch(in_each_process, 2, device="cpu", args=(folder,))
    return [torch.load(folder / f"gathered_{i}.pth") for i in range(2)]


@needs_distributed
@pytest.mark.parametrize("i", range(len(COUNTS)), ids=str)
def test_all_processes_get_the_rows_of_all_in_the_order_of_ranks(
    i: int, ranks: List[Dict[str, Any]]
) -> None:
    expected = torch.cat([rows_of(rank, count) for rank, count in enumerate(COUNTS[i])])
    for found in ranks:
        assert torch.equal(found["found"][i]["rows"], expected)
        assert torch.equal(found["found"][i]["integers"], expected.long()), "of any type"


@needs_distributed
@pytest.mark.parametrize("i", range(len(COUNTS)), ids=str)
def test_gradient_stays_with_the_rows_of_a_process(i: int, ranks: List[Dict[str, Any]]) -> None:
    # That of a process's own sum: the weights of its own rows, once.
    expected = weights_of(COUNTS[i]).split(COUNTS[i])
    for rank, found in enumerate(ranks):
        assert torch.equal(found["found"][i]["gradient"], expected[rank])


@needs_distributed
def test_number_of_rows_that_is_not_the_announced_one_is_refused(
    ranks: List[Dict[str, Any]],
) -> None:
    for rank, found in enumerate(ranks):
        assert f"1 rows, but counts are [2, 2] and this is rank {rank}" in found["error"]


@pytest.mark.parametrize("count", [0, 3])
def test_single_process_has_all_rows_already(count: int) -> None:
    x = rows_of(0, count).requires_grad_()
    assert gather_rows(x, [count]) is x
