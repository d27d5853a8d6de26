"""Heads on regions in two processes that have different numbers of them: as one with all."""

from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import pytest
import torch
from torch import Tensor, nn

from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from d2kd.engine.parallel import data_parallel
from d2kd.heads import CKDHead, RoIClsHead, RoILocHead, RoIMaskHead, SGFIHead
from d2kd.views import Regions, RegionSampler, dense
from d2kd.views.predictions import RoIPredictions
from d2kd.views.regions import Source
from tests.helpers.forks import launch_two
from tests.helpers.runs import assert_same_tensors
from tests.helpers.toys import FeatureView, batch, distill_config, noise, write_teacher

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed"),
]

# Regions of two images in a few steps in turn. Process 0 has the first image, process 1 the second.
COUNTS = [(3, 1), (0, 2), (2, 0), (2, 5)]
CLASSES = 3


# Views with everything that the heads read, and no detector behind them --------------------------


class Step(NamedTuple):
    """
    What student and teacher say of the regions of some images.

    `features`, `vectors`, `logits`, `deltas` are the student's, leaves of its graph.
    """

    regions: Regions
    features: Dict[str, Tensor]
    vectors: Tensor
    logits: Tensor
    deltas: Tensor
    teacher: Dict[str, Tensor]

    @property
    def leaves(self) -> Dict[str, Tensor]:
        rest = {"vectors": self.vectors, "logits": self.logits, "deltas": self.deltas}
        return {**self.features, **rest}


class StudentView(FeatureView):
    def __init__(self, step: Step):
        super().__init__(step.features)
        self.step = step

    def regions(self, sampler: Optional[RegionSampler] = None) -> Regions:
        return self.step.regions

    def region_vectors(self, regions: Regions) -> Tensor:
        return self.step.vectors

    def roi_predictions(self, boxes: Optional[List[Boxes]] = None) -> RoIPredictions:
        assert boxes is None
        return RoIPredictions(self.step.vectors, self.step.logits, self.step.deltas)

    @property
    def mask_regions(self) -> Regions:
        return self.step.regions

    @property
    def mask_proposals(self) -> List[Instances]:
        classes = [torch.arange(len(x)) % CLASSES for x in self.step.regions.boxes]
        return [Instances((64, 64), gt_classes=x) for x in classes]

    def mask_logits(self, boxes: Optional[List[Boxes]] = None) -> Tensor:
        assert boxes is None
        return self.step.deltas.view(-1, CLASSES, 2, 2)

    @property
    def num_classes(self) -> int:
        return CLASSES


class TeacherView(FeatureView):
    two_stage = True

    def __init__(self, step: Step):
        super().__init__({})
        self.step = step

    def region_vectors(self, regions: Regions) -> Tensor:
        return self.step.teacher["vectors"]

    def roi_features(self, boxes: List[Boxes]) -> Tensor:
        assert boxes is self.step.regions.boxes
        return self.step.teacher["roi_features"]

    def mask_features(self, boxes: Optional[List[Boxes]] = None) -> Tensor:
        assert boxes is self.step.regions.boxes
        return self.step.teacher["roi_features"]

    def mask_logits(self, boxes: Optional[List[Boxes]] = None) -> Tensor:
        assert boxes is self.step.regions.boxes
        return self.step.teacher["deltas"].view(-1, CLASSES, 2, 2)

    def roi_predictions(self, boxes: Optional[List[Boxes]] = None) -> RoIPredictions:
        assert boxes is self.step.regions.boxes
        return RoIPredictions(*(self.step.teacher[k] for k in ("vectors", "logits", "deltas")))


def step_of(index: int, images: List[int]) -> Step:
    """The given images of step `index`; an image is the same whichever others there are."""
    counts, sizes = COUNTS[index], (4, 6, CLASSES + 1, CLASSES * 4)

    def of_regions(seed: int, *shape: int) -> Tensor:
        rows = [noise(counts[i], *shape, seed=100 * index + 10 * seed + i) for i in images]
        return torch.cat(rows).float()

    boxes = [boxes_of(counts[i]) for i in images]
    source = Source(*torch.cat([anchors_of(counts[i]) for i in images]).unbind(1))
    leaves = {
        k: torch.cat([noise(1, 4, n, n, seed=200 * index + n + i) for i in images]).float()
        for k, n in (("p3", 8), ("p4", 4))
    }
    step = Step(
        Regions(boxes, source),
        leaves,
        *(of_regions(seed, size) for seed, size in enumerate((sizes[0], *sizes[2:]))),
        {
            "vectors": of_regions(5, sizes[1]),
            "logits": of_regions(6, sizes[2]),
            "deltas": of_regions(7, sizes[3]),
            "roi_features": of_regions(8, 8, 7, 7),
        },
    )
    for x in step.leaves.values():
        x.requires_grad_()
    return step


def boxes_of(count: int) -> Boxes:
    """On the left and on the right in turn; those of a side overlap by more than half."""
    index = torch.arange(count).float()
    left, top = 34 * (index % 2) + index, 2 * index
    return Boxes(torch.stack([left, top, left + 30, top + 30], dim=1))


def anchors_of(count: int) -> Tensor:
    """(count, 4) as in Source: each region in a cell of its own, anchor 0, 1, 0, ..."""
    index = torch.arange(count)
    return torch.stack([torch.full_like(index, 8), index, index, index % 2], dim=1)


class OnSteps(nn.Module):
    """What DistributedDataParallel may wrap: a head, called with a step."""

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head = head

    def forward(self, step: Step) -> Tensor:
        (loss,) = self.head(StudentView(step), TeacherView(step)).values()
        return loss


def sgfi(chunk_size: int, pooler: str = "box") -> SGFIHead:
    head = SGFIHead(
        student_levels=["p3", "p4"],
        student_channels=4,
        teacher_channels=8,
        sampler=RegionSampler(),
        chunk_size=chunk_size,
        pooler=pooler,
    )
    for conv in head.embedding[0], head.embedding[2]:
        nn.init.constant_(conv.bias, 0.3)  # few channels: none may begin with a dead ReLU
    return head


def ckd(queue_size: int, shared_channels: int = 0) -> CKDHead:
    return CKDHead(
        student_channels=4,
        teacher_channels=6,
        num_anchors=2,
        sampler=RegionSampler(),
        temperature=0.5,
        queue_size=queue_size,
        projection="shared" if shared_channels else "student",
        shared_channels=shared_channels or 128,
    )


HEADS: Dict[str, Callable[[], nn.Module]] = {
    "SGFI": lambda: sgfi(0),
    "SGFI in chunks": lambda: sgfi(2),
    "SGFI of the mask head's features": lambda: sgfi(0, "mask"),
    "CKD": lambda: ckd(0),
    "CKD with a queue": lambda: ckd(7),  # in the second step 6 keys, then 8: it goes round
    "CKD with a shared projection": lambda: ckd(7, shared_channels=3),
    "RoICls": lambda: RoIClsHead(temperature=2.0),
    "RoILoc": RoILocHead,
    "RoIMask": RoIMaskHead,
}


def steps_with(name: str, images: List[int]) -> List[Dict[str, Any]]:
    """Losses and gradients of every step, with the images of this process."""
    torch.manual_seed(0)
    head = HEADS[name]()
    model: nn.Module = OnSteps(head)
    if list(head.parameters()):
        model = data_parallel(model)
    found = []
    for index in range(len(COUNTS)):
        model.zero_grad()
        step = step_of(index, images)
        loss = model(step)
        loss.backward()
        found.append(
            {
                "loss": loss.detach(),
                "regions": len(step.regions),
                "mean_count": step.regions.mean_count,
                "student": {k: x.grad for k, x in step.leaves.items()},
                "head": {k: p.grad for k, p in head.named_parameters()},
                "queue": getattr(head, "queue", torch.empty(0)).clone(),
                "num_queued": len(getattr(head, "queue", ())),
            }
        )
    return found


# Real detectors ----------------------------------------------------------------------------------


def state_of(model: nn.Module) -> Dict[str, Tensor]:
    """Without BatchNorm's statistics, which every process has of its own images."""
    state = model.state_dict()
    if "heads.CKD._extra_state" in state:
        state["queue"] = state["heads.CKD._extra_state"]["queue"]
    return {k: v.clone() for k, v in state.items() if isinstance(v, Tensor) and "running_" not in k}


def empty_sample(view: Any, sampler: RegionSampler) -> Regions:
    nothing = torch.zeros(0, dtype=torch.int64)
    return Regions([Boxes(torch.zeros(0, 4)) for _ in view.gt_instances], Source(*[nothing] * 4))


def detector_steps(teacher: List[Any]) -> Dict[str, Any]:
    """
    A RetinaNet after a step in which process 1 has no boxes, one in which it has no region at all,
    and one in which no process has any.
    """
    rank, sample = comm.get_rank(), dense.sample_regions
    values = {"DISTILL__REGIONS__PER_IMAGE": 8, "DISTILL__CKD__QUEUE_SIZE": 100}
    torch.manual_seed(0)
    cfg = distill_config("retinanet", teacher, ["SGFI", "CKD"], **values)
    cfg.MODEL.RETINANET.NORM = ""  # p7 is a single cell
    distiller = build_model(cfg).train()
    before = state_of(distiller)
    model = data_parallel(distiller)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    torch.manual_seed(rank)
    losses, regions, states = [], [], []
    for i in range(3):
        empty = i == 2 or (i == 1 and rank == 1)
        dense.sample_regions = empty_sample if empty else sample
        optimizer.zero_grad()
        with EventStorage():
            found = model(batch(2, boxes=0 if rank else 2, seed=10 * i + rank))
        sum(found.values()).backward()
        optimizer.step()
        view = distiller.last_step.student
        regions.append(len(view.regions(distiller.heads["CKD"].sampler)))
        losses.append({k: v.item() for k, v in found.items()})
        states.append(state_of(distiller))
    dense.sample_regions = sample
    return {"losses": losses, "regions": regions, "states": states, "before": before}


def in_each_process(folder: Path, teacher: List[Any]) -> None:
    """All that is done with two processes; what they found is left in files."""
    rank = comm.get_rank()
    found: Dict[str, Any] = {name: steps_with(name, [rank]) for name in HEADS}
    found["detectors"] = detector_steps(teacher)
    torch.save(found, folder / f"regions_{rank}.pth")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> List[Dict[str, Any]]:
    teacher = write_teacher(folder, "faster_rcnn", MODEL__FPN__OUT_CHANNELS=64)
    launch_two(in_each_process, folder, teacher)
    return [torch.load(folder / f"regions_{i}.pth") for i in range(2)]


@pytest.mark.parametrize("name", HEADS)
def test_steps_of_two_processes_are_those_of_one_with_all_regions(
    name: str, ranks: List[Dict[str, Any]]
) -> None:
    # DistributedDataParallel averages the processes' gradients, so their losses count by half.
    # What a process has of its own, the student's answers, is not averaged: halved by hand.
    whole = steps_with(name, [0, 1])
    for index, expected in enumerate(whole):
        parts = [found[name][index] for found in ranks]
        assert tuple(x["regions"] for x in parts) == COUNTS[index]
        assert expected["loss"] > 0.01
        loss = (parts[0]["loss"] + parts[1]["loss"]) / 2
        torch.testing.assert_close(loss, expected["loss"], rtol=1e-5, atol=1e-7)
        for key, gradient in expected["student"].items():
            if gradient is None:
                assert all(x["student"][key] is None for x in parts)
                continue
            gathered = torch.cat([x["student"][key] for x in parts]) / 2
            torch.testing.assert_close(gathered, gradient, rtol=1e-4, atol=1e-6)
        assert any(x is not None and x.abs().sum() > 0 for x in expected["student"].values())
        for key, gradient in expected["head"].items():
            for x in parts:
                torch.testing.assert_close(x["head"][key], gradient, rtol=1e-4, atol=1e-6)
        assert all(x["mean_count"] == expected["regions"] / 2 for x in parts)


@pytest.mark.parametrize("name", ["CKD", "CKD with a queue"])
def test_queues_of_the_processes_are_that_of_one_with_all_regions(
    name: str, ranks: List[Dict[str, Any]]
) -> None:
    whole = steps_with(name, [0, 1])
    sizes = [x["num_queued"] for x in whole]
    assert sizes == ([4, 6, 7, 7] if "queue" in name else [0, 0, 0, 0])
    for index, expected in enumerate(whole):
        parts = [found[name][index] for found in ranks]
        assert [x["num_queued"] for x in parts] == [expected["num_queued"]] * 2
        assert torch.equal(parts[0]["queue"], parts[1]["queue"])
        torch.testing.assert_close(parts[0]["queue"], expected["queue"], rtol=1e-6, atol=1e-7)


def test_process_without_regions_still_takes_part(ranks: List[Dict[str, Any]]) -> None:
    for name in HEADS:
        assert ranks[0][name][1]["loss"] == ranks[1][name][2]["loss"] == 0.0


def test_detectors_stay_equal_when_a_process_has_no_boxes_or_no_regions(
    ranks: List[Dict[str, Any]],
) -> None:
    first, second = (x["detectors"] for x in ranks)
    assert_same_tensors(second["before"], first["before"])
    for ours, theirs in zip(first["states"], second["states"]):
        assert_same_tensors(
            {k: v for k, v in theirs.items() if "num_batches" not in k},
            {k: v for k, v in ours.items() if "num_batches" not in k},
        )
    assert first["regions"] == [16, 16, 0] and second["regions"] == [16, 0, 0]
    for key in ("loss_sgfi", "loss_ckd"):
        assert [x[key] > 0 for x in first["losses"]] == [True, True, False]
        assert [x[key] > 0 for x in second["losses"]] == [True, False, False]
    # Heads and student were trained in the step where process 1 had no region.
    one, two = first["states"][:2]
    for key in ("heads.CKD.projection.weight", "heads.SGFI.adapter.weight"):
        assert not torch.equal(two[key], one[key])
    assert len(two["queue"]) > len(one["queue"]) > 0
