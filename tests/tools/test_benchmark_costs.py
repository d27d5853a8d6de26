"""A toy head's FLOPs, parameters and saved bytes are those worked out by hand."""

from argparse import Namespace
from types import ModuleType, SimpleNamespace
from typing import Any, Callable, Dict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2kd import DetectorView, Distiller
from d2kd.lesson import Lesson
from d2kd.views import DensePredictions, LazyLevels
from d2kd.views.lazy_levels import Later


@pytest.fixture
def costs(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("benchmark_costs")


class ToyHead(nn.Module):
    """Squared difference of p3 after a 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter = nn.Conv2d(32, 32, kernel_size=1)

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Tensor]:
        difference = self.adapter(student.features["p3"]) - teacher.features["p3"]
        return {"loss_toy": difference.square().sum()}


def test_products_of_attention_are_counted_however_it_is_computed(costs: ModuleType) -> None:
    """
    Queries x keys and weights x values; in the backward two gradients of each, and once more the
    weights, which fused attention does not keep.
    """
    pytest.importorskip("torch.utils.flop_counter")
    inputs = [torch.randn(2, 1, 40, 16, requires_grad=True) for _ in range(3)]
    product = 2 * 2 * 40 * 40 * 16

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(*inputs)

    with torch.no_grad():
        assert costs.count_flops(forward) == 2 * product
    assert costs.count_flops(lambda: forward().sum().backward()) == (2 + 5) * product


def test_costs_of_a_head_on_what_detectors_recorded(
    costs: ModuleType,
    tool: Callable[[str], ModuleType],
    small_args: Callable[..., Namespace],
    config_file: Callable[[str, str], str],
) -> None:
    pytest.importorskip("torch.utils.flop_counter")
    parts = tool("benchmark_parts")
    args = small_args("--config-file", config_file("retinanet", "retinanet"))
    cfg = parts.build_config(args, "")
    whole = build_model(cfg).train()
    distiller = Distiller(
        student=whole.student,
        lessons=[Lesson(whole.teacher, ["TOY"])],
        heads={"TOY": ToyHead()},
        schedules={"TOY": lambda iteration: 1.0},
        image_format=whole.image_format,
    )
    with EventStorage():
        batch = parts.random_batch(whole.student, args)
        measured = costs.head_costs(parts.HeadAlone(cfg, distiller, batch))
    assert measured == {
        # Two images of 64x96 pixels, so p3 is (2, 32, 8, 12). 2 * N*H*W * Cin * Cout forward; in
        # the backward as many for the input's gradient, and again for the weights'.
        "flops": 3 * (2 * 2 * 8 * 12 * 32 * 32),
        "parameters": 32 * 32 + 32,
        # square() keeps the difference, N*C*H*W floats of 4 bytes. The convolution keeps its input
        # and its weights, which are there anyway.
        "saved_bytes": 2 * 32 * 8 * 12 * 4,
    }


def test_chunks_save_less_and_compute_more(
    costs: ModuleType, head_alone: Callable[..., Any]
) -> None:
    """32 regions of a two-stage student, 4 at a time."""
    whole, chunks = (
        costs.head_costs(
            head_alone("faster_rcnn", "faster_rcnn", "SGFI", "DISTILL.SGFI.CHUNK_SIZE", size)
        )
        for size in ("0", "4")
    )
    # Of 5 levels' RoI features of 32 channels and 7 x 7 cells, none is kept.
    assert whole["saved_bytes"] - chunks["saved_bytes"] > 32 * 5 * 32 * 7 * 7 * 4
    # The teacher's are, for the backward to start from: a float takes 4 bytes.
    assert chunks["saved_bytes"] > 32 * 32 * 7 * 7 * 4
    assert chunks["parameters"] == whole["parameters"]
    if whole["flops"] is not None:
        # The backward begins with the forward once more: four thirds, where it is twice a forward.
        assert 1.2 < chunks["flops"] / whole["flops"] < 4 / 3 + 0.1


def test_flops_are_unknown_without_a_counter(
    costs: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(costs, "flop_counter", None)
    assert costs.count_flops(lambda: None) is None


def test_flops_of_what_multiplies_nothing_are_0(costs: ModuleType) -> None:
    pytest.importorskip("torch.utils.flop_counter")
    x = torch.ones(3, requires_grad=True)
    assert costs.count_flops(lambda: x.exp().sum().backward()) == 0


# Of 6 floats, 24 bytes.
SAVED = {
    "a product keeps both factors, here one storage": (lambda x: (x * 2).square().sum(), 24),
    "exp keeps its result": (lambda x: (x * 2).exp().sum(), 24),
    "exp keeps its result, sin its argument": (lambda x: (x * 2).exp().sin().sum(), 24),
    "cos keeps its argument, exp its result": (lambda x: (x * 2).cos().exp().sum(), 48),
    "half of a storage keeps all of it": (lambda x: (x * 2)[:3].cos().sum(), 24),
    "a sum keeps nothing": (lambda x: (x * 2).sum(), 0),
    "a leaf is left out": (lambda x: x.cos().sum(), 0),
    "and so is a view of it": (lambda x: x.view(2, 3)[0].cos().sum(), 0),
    "what leads to no loss is let go": (lambda x: x.sum() + (x * 2).exp().detach().sum(), 0),
}


@pytest.mark.parametrize("case", SAVED)
def test_saved_bytes(costs: ModuleType, case: str) -> None:
    forward, expected = SAVED[case]
    x = torch.linspace(0, 1, 6, requires_grad=True)
    assert costs.saved_bytes(lambda: forward(x), leave_out=[x]) == expected


def test_given_are_recorded_tensors_parameters_and_buffers(
    tool: Callable[[str], ModuleType],
) -> None:
    alone = tool("benchmark_parts").HeadAlone.__new__(tool("benchmark_parts").HeadAlone)
    recorded, weight, mean = torch.zeros(1), nn.Parameter(torch.zeros(1)), torch.zeros(1)
    detector, empty = nn.Module(), nn.Module()
    detector.weight = weight
    detector.register_buffer("mean", mean)
    alone.heads = empty
    alone.student = SimpleNamespace(_recorded={"dense": [recorded]}, detector=detector)
    level, logits = torch.zeros(1), torch.zeros(1)
    dense = DensePredictions(["p3"], [Later(lambda: logits, "cpu")], [], [])
    levels = LazyLevels({"p3": Later(lambda: level, "cpu")})
    alone.teacher = SimpleNamespace(_recorded={"a": levels, "b": dense}, detector=empty)
    expected = [recorded, level, logits, weight, mean]
    assert [id(x) for x in alone.given()] == [id(x) for x in expected]
