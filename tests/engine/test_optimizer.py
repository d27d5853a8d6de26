"""SOLVER.OPTIMIZER: both kinds train the same groups, are clipped, and go on where they stopped."""

from pathlib import Path
from typing import Any, Dict, List, Optional, Set, Tuple

import pytest
import torch
from torch import nn

from detectron2.config import CfgNode

from d2kd import load_config
from d2kd.engine.optimizer import OPTIMIZERS, build_optimizer, parameter_names, placed_state
from tests.helpers.runs import (
    assert_same_checkpoint,
    at,
    build_trainer,
    interrupt,
    run,
    run_config,
    saved,
)

RULES = {"WEIGHT_DECAY": 0.05, "WEIGHT_DECAY_NORM": 0.01, "WEIGHT_DECAY_BIAS": 0.02}


class Sparing(nn.Module):
    """A head with a parameter that is not to decay."""

    no_weight_decay = frozenset({"temperature"})

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(1))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Sparing())


def solver(kind: str, clip: Optional[Dict[str, Any]] = None, **values: Any) -> CfgNode:
    values = {"OPTIMIZER": kind, "BASE_LR": 0.1, **values}
    values.update({f"CLIP_GRADIENTS.{k}": v for k, v in (clip or {}).items()})
    return load_config(opts=[x for k, v in values.items() for x in (f"SOLVER.{k}", v)])


def groups(optimizer: torch.optim.Optimizer, net: nn.Module) -> Set[Tuple[str, float, float]]:
    """(name, learning rate, weight decay) of every parameter."""
    names = {id(p): k for k, p in net.named_parameters()}
    found = optimizer.param_groups
    return {(names[id(p)], x["lr"], x["weight_decay"]) for x in found for p in x["params"]}


def test_backbone_with_a_method_of_that_name_is_not_asked() -> None:
    # As timm's transformers and the released Swin have it, for trainers of their own.
    net = model()
    net[0].no_weight_decay = lambda: {"weight"}
    plain, cfg = model(), solver("SGD")
    found, expected = (groups(build_optimizer(cfg, x), x) for x in (net, plain))
    assert found == expected


def test_name_of_no_parameter_is_refused() -> None:
    net = model()
    net[2].no_weight_decay = ("temprature",)
    with pytest.raises(ValueError, match="Sparing.no_weight_decay has 'temprature'.* temperature"):
        build_optimizer(solver("SGD"), net)


def test_adamw_has_detectron2s_rules_of_weight_decay_and_learning_rate() -> None:
    nets = {kind: model() for kind in OPTIMIZERS}
    built = {k: build_optimizer(solver(k, BIAS_LR_FACTOR=2.0, **RULES), x) for k, x in nets.items()}
    assert type(built["ADAMW"]) is torch.optim.AdamW
    assert len(built["ADAMW"].param_groups) == 4, "a step over many groups is slow"
    assert groups(built["ADAMW"], nets["ADAMW"]) == groups(built["SGD"], nets["SGD"])
    assert groups(built["ADAMW"], nets["ADAMW"]) == {
        ("0.weight", 0.1, 0.05),
        ("0.bias", 0.2, 0.02),
        ("1.weight", 0.1, 0.01),
        ("1.bias", 0.2, 0.02),
        ("2.temperature", 0.1, 0.0),
    }


def test_adamw_steps_as_pytorchs() -> None:
    ours, theirs = model(), model()
    optimizer = build_optimizer(solver("ADAMW", **dict.fromkeys(RULES, 0.05)), ours)
    for net, steps in (
        (ours, optimizer),
        (theirs, torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.05)),
    ):
        for p in net.parameters():
            p.grad = torch.full_like(p, 0.3)
        steps.step()
    for name in ("0.weight", "0.bias", "1.weight"):
        torch.testing.assert_close(ours.get_parameter(name), theirs.get_parameter(name))


def test_state_goes_to_the_parameter_of_its_name_in_other_groups() -> None:
    net = model()
    alike = dict.fromkeys(RULES, 0.05)  # one group
    before, after = (build_optimizer(solver("ADAMW", **x), net) for x in (alike, RULES))
    names = [parameter_names(x, net) for x in (before, after)]
    assert names[0] != names[1] and sorted(names[0]) == sorted(names[1])
    for i, p in enumerate(net.parameters()):
        p.grad = torch.full_like(p, i)
    before.step()
    after.load_state_dict(placed_state(after, names[1], before.state_dict(), names[0]))
    for i, p in enumerate(net.parameters()):
        # (1 - 0.9) of the first gradient
        torch.testing.assert_close(after.state[p]["exp_avg"], torch.full_like(p, 0.1 * i))


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("clip_type, norm", [("value", None), ("norm", 0.5), ("full_model", 0.5)])
def test_gradients_are_clipped_before_the_step(kind: str, clip_type: str, norm: Any) -> None:
    net = model()
    clip = {"ENABLED": True, "CLIP_TYPE": clip_type, "CLIP_VALUE": 0.5}
    optimizer = build_optimizer(solver(kind, clip), net)
    for p in net.parameters():
        p.grad = torch.full_like(p, 9.0)
    optimizer.step()
    gradients = [p.grad for p in net.parameters()]
    if clip_type == "value":
        assert all((x == 0.5).all() for x in gradients)
    else:
        norms = torch.stack([x.norm() for x in gradients])
        seen = norms if clip_type == "norm" else norms.norm()
        torch.testing.assert_close(seen, torch.full_like(seen, norm))


@pytest.mark.parametrize("clip_type", ["value", "norm", "full_model"])
def test_nothing_is_clipped_where_that_is_switched_off(clip_type: str) -> None:
    """As by an override of a recipe that clips."""
    net = model()
    clip = {"ENABLED": False, "CLIP_TYPE": clip_type, "CLIP_VALUE": 0.5}
    optimizer = build_optimizer(solver("SGD", clip), net)
    for p in net.parameters():
        p.grad = torch.full_like(p, 9.0)
    optimizer.step()
    assert all((p.grad == 9.0).all() for p in net.parameters())


def test_norm_over_the_whole_model_is_of_the_type_that_is_named() -> None:
    net = model()
    clip = {"ENABLED": True, "CLIP_TYPE": "full_model", "CLIP_VALUE": 0.5, "NORM_TYPE": 1.0}
    optimizer = build_optimizer(solver("SGD", clip), net)
    for p in net.parameters():
        p.grad = torch.full_like(p, 9.0)
    optimizer.step()
    assert sum(p.grad.abs().sum().item() for p in net.parameters()) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_with_amp_gradients_are_unscaled_before_they_are_clipped(kind: str) -> None:
    net = model()
    clip = {"ENABLED": True, "CLIP_TYPE": "full_model", "CLIP_VALUE": 0.5}
    cfg = solver(kind, clip)
    cfg.SOLVER.AMP.ENABLED = True
    optimizer = build_optimizer(cfg, net)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    # Each parameter's gradient is 1e-3, which is less than the bound and 1024 times it more.
    scaler.scale(sum(1e-3 * p.sum() for p in net.parameters())).backward()
    scaler.step(optimizer)
    for p in net.parameters():
        torch.testing.assert_close(p.grad, torch.full_like(p, 1e-3))


@pytest.fixture(scope="module")
def whole(folder: Path, teacher: List[Any]) -> CfgNode:
    """Config of an uninterrupted distillation with AdamW."""
    cfg = run_config(folder, teacher, ["PKD"], SOLVER__OPTIMIZER="ADAMW", SOLVER__WEIGHT_DECAY=0.05)
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    run(cfg)
    return cfg


def test_run_with_adamw_resumes_to_the_same_bits(whole: CfgNode, tmp_path: Path) -> None:
    parts = at(whole, tmp_path, "parts")
    interrupt(parts, 2)
    run(parts, resume=True)
    assert_same_checkpoint(saved(parts), saved(whole))
    state = saved(whole)["trainer"]["_trainer"]["optimizer"]["state"]
    assert all(x["exp_avg_sq"].sum() > 0 and x["step"] == 4 for x in state.values())


@pytest.mark.parametrize("known", [True, False], ids=["", "checkpoint of before the key"])
def test_other_optimizer_is_refused_with_both_values(
    known: bool, whole: CfgNode, tmp_path: Path
) -> None:
    begun = at(whole, tmp_path, "begun")
    interrupt(begun, 2)
    if not known:
        path = Path(begun.OUTPUT_DIR) / "model_0000001.pth"
        checkpoint = torch.load(path, weights_only=True)
        del checkpoint["trainer"]["config"]
        torch.save(checkpoint, path)
    begun.SOLVER.OPTIMIZER = "SGD"
    message = "SOLVER.OPTIMIZER: the checkpoint's is ADAMW, now SGD.*OUTPUT_DIR of its own"
    with pytest.raises(ValueError, match=message):
        build_trainer(begun, resume=True)
