"""What two processes agree on: losses divided by what all of them have, not each."""

import multiprocessing
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import torch
from torch import Tensor

from detectron2.utils import comm

from d2kd.heads import BCKDHead, CrossKDHead, DKDHead, MARHead, MLDHead
from d2kd.utils.compat import create_local_process_group
from d2kd.utils.processes import mean_over_processes
from d2kd.views import RegionSampler
from tests.helpers.baseline_references import PartsView
from tests.helpers.logit_references import (
    ANCHORS,
    CellView,
    align,
    cell_view,
    crosskd_sums,
    positives,
    region_views,
    total,
)
from tests.helpers.toys import level_pairs, noise

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed"),
]

LEVELS = level_pairs(p3=(4, 4), p4=(4, 4))
REGIONS = [(0, 5), (5, 6)]  # of process 0, and of process 1


def images(seed: int, which: List[int]) -> CellView:
    """cell_view with some of its two images; the first has few positives."""
    view = cell_view(seed)
    view.labels = {k: x.clone() for k, x in view.labels.items()}
    view.labels["p3"][0], view.labels["p4"][0, :, 0] = 3, -1
    for maps in (view.logits, view.decoded, view.labels):
        maps.update({k: x[which].clone() for k, x in maps.items()})
    view._features = view.logits
    return view


def leaves_of(view: CellView) -> Dict[str, Tensor]:
    leaves = {f"logits {k}": x for k, x in view.logits.items()}
    leaves.update({f"boxes {k}": x for k, x in view.decoded.items()})
    for x in leaves.values():
        x.requires_grad_()
    return leaves


def bckd(which: List[int]) -> Dict[str, Any]:
    student, teacher = images(0, which), images(5, which)
    leaves = leaves_of(student)
    loss = total(BCKDHead(levels=LEVELS, num_anchors=ANCHORS)(student, teacher))
    loss.backward()
    return {"loss": loss.item(), "gradients": {k: x.grad for k, x in leaves.items()}}


def crosskd(which: List[int]) -> Dict[str, Any]:
    losses = CrossKDHead(levels=LEVELS, num_anchors=ANCHORS)(images(0, which), images(5, which))
    return {k: sum(v.values()).item() for k, v in losses.items()}


def mld(which: List[int]) -> Dict[str, Any]:
    """Of the second image the teacher is sure, of the first it is not."""
    student, teacher = images(0, which), images(5, which)
    for view, factor in ((student, 1.0), (teacher, 3.0)):
        for x in view.logits.values():
            x -= torch.tensor([12.0, 0.0])[which].view(-1, 1, 1, 1)
            x *= factor
    leaves = leaves_of(student)
    loss = total(MLDHead(levels=LEVELS, two_stage=False, guide="logits")(student, teacher))
    loss.backward()
    return {"loss": loss.item(), "gradients": {k: x.grad for k, x in leaves.items() if "l" in k}}


def mar(which: List[int]) -> Dict[str, Any]:
    """The first image has a large object, the second one none."""
    boxes = [[[2.0, 2.0, 30.0, 22.0]], []]
    x, target = (noise(2, 4, 3, 4, seed=s).float()[which] for s in (1, 2))
    student, teacher = (PartsView({"p3": v}, [boxes[i] for i in which]) for v in (x, target))
    torch.manual_seed(0)
    head = MARHead(levels=level_pairs(p3=(4, 4)), dense_levels=LEVELS[:1], sampler=RegionSampler())
    x.requires_grad_()
    loss = total({"": head._features(student, teacher)})
    loss.backward()
    return {"loss": loss.item(), "gradients": {"": x.grad}}


def of_regions(head: torch.nn.Module, start: int, end: int) -> Dict[str, Any]:
    student, teacher = (noise(6, 4, seed=s)[start:end] for s in (1, 2))
    student.requires_grad_()
    loss = sum(head(*region_views(student, teacher, [0, 1, 3, 3, 2, 0][start:end])).values())
    loss.backward()
    return {"loss": loss.item(), "gradients": {"": student.grad}}


def dkd(which: List[int]) -> Dict[str, Any]:
    return of_regions(DKDHead(), *region_slice(which))


def mld_of_regions(which: List[int]) -> Dict[str, Any]:
    return of_regions(MLDHead(levels=(), two_stage=True, guide="logits"), *region_slice(which))


def region_slice(which: List[int]) -> Tuple[int, int]:
    return REGIONS[which[0]][0], REGIONS[which[-1]][1]


# Heads whose two processes, with images or regions of their own, are one with all of them.
HEADS = {"BCKD": bckd, "MLD": mld, "MAR": mar, "DKD": dkd, "MLD, regions": mld_of_regions}


def in_each_process(rank: int, folder: Path) -> None:
    """All that is done with two processes; what they found is left in files."""
    torch.set_num_threads(1)  # the threads of the process that was forked are not here
    group = {"init_method": f"file://{folder}/rendezvous", "world_size": 2, "rank": rank}
    torch.distributed.init_process_group("gloo", **group)
    create_local_process_group(2, machine_rank=0)
    assert comm.get_rank() == rank and comm.get_world_size() == 2
    x = torch.tensor([1.0, 10.0], requires_grad=True) * (rank + 1)
    mean, count = mean_over_processes(x), mean_over_processes(torch.tensor(3 + 2 * rank))
    found = {
        "mean": (mean, count, x.detach()),
        "crosskd": crosskd([rank]),
        **{name: head([rank]) for name, head in HEADS.items()},
    }
    torch.save(found, folder / f"{rank}.pth")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> List[Dict[str, Any]]:
    context = multiprocessing.get_context("fork")  # without seconds of imports
    processes = [context.Process(target=in_each_process, args=(i, folder)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
    assert [x.exitcode for x in processes] == [0, 0]
    return [torch.load(folder / f"{i}.pth") for i in range(2)]


def test_mean_is_that_of_all_processes_and_what_went_in_is_unchanged(
    ranks: List[Dict[str, Any]],
) -> None:
    for rank, found in enumerate(ranks):
        mean, count, own = found["mean"]
        assert mean.tolist() == [1.5, 15.0] and not mean.requires_grad
        assert count.item() == 4 and count.dtype == torch.float32, "of integers, too"
        assert own.tolist() == [1.0 + rank, 10.0 + 10 * rank]


def test_of_one_process_the_mean_is_its_own_value() -> None:
    x = torch.tensor([1, 2], dtype=torch.int64)
    assert mean_over_processes(x).tolist() == [1.0, 2.0]
    assert not mean_over_processes(torch.ones(2, requires_grad=True)).requires_grad


@pytest.mark.parametrize("name", HEADS)
def test_losses_of_two_processes_are_those_of_one_with_everything(
    name: str, ranks: List[Dict[str, Any]]
) -> None:
    # DistributedDataParallel averages gradients, so that each process counts by half.
    whole, parts = HEADS[name]([0, 1]), [x[name] for x in ranks]
    assert sum(x["loss"] for x in parts) / 2 == pytest.approx(whole["loss"], rel=1e-5)
    assert whole["loss"] > 0.01
    for key, expected in whole["gradients"].items():
        found = torch.cat([x["gradients"][key] for x in parts]) / 2
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_crosskd_divides_by_the_mean_of_positives(
    ranks: List[Dict[str, Any]],
) -> None:
    # What is put to the teacher's mean and deviation is what a process has itself.
    sums = []
    for i in range(2):
        student, teacher = images(0, [i]), images(5, [i])
        terms = []
        for level in ("p3", "p4"):
            logits, boxes = (
                (align(x[level], y[level]), y[level])
                for x, y in ((student.logits, teacher.logits), (student.decoded, teacher.decoded))
            )
            terms.append(crosskd_sums(logits, boxes, student.labels[level], "giou"))
        sums.append([sum(x) for x in zip(*terms)])
    counts = [positives(images(0, [i])) for i in range(2)]
    count = sum(counts) / 2
    assert 0 < counts[0] < counts[1]
    for found, (cls, box) in zip(ranks, sums):
        assert found["crosskd"]["loss_crosskd_cls"] == pytest.approx(cls / count, rel=1e-3)
        assert found["crosskd"]["loss_crosskd_box"] == pytest.approx(box / count, rel=1e-3)
