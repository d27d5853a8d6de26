"""A convolution into which a norm was folded says what both said, and nothing else is folded."""

from typing import Callable

import pytest
import torch
from torch import nn

from detectron2.layers import Conv2d, FrozenBatchNorm2d

from d2kd.modeling.backbone_teacher import BackboneTeacher
from d2kd.teacher.fold_norms import fold_norms

NORMS = {"FrozenBN": FrozenBatchNorm2d, "BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm}


def with_statistics(norm: nn.Module) -> nn.Module:
    """The norm in eval mode, with random numbers in all that it has."""
    for value in norm.state_dict().values():
        if value.is_floating_point():
            value.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm.eval().requires_grad_(False)


def expected(conv: nn.Conv2d, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """gamma (w * x + b - mean) / sqrt(var + eps) + beta"""
    mean, var, gamma, beta = (
        y.view(1, -1, 1, 1) for y in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    x = nn.functional.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, 1, conv.groups)
    return gamma * (x - mean) / (var + norm.eps).sqrt() + beta


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_norm_of_detectron2_s_layer_is_folded_before_its_activation(norm: str, bias: bool) -> None:
    torch.manual_seed(0)
    own = with_statistics(NORMS[norm](8))
    conv = Conv2d(
        4, 8, 3, stride=2, padding=1, groups=2, bias=bias, norm=own, activation=torch.tanh
    )
    x = torch.randn(2, 4, 9, 9)
    wanted = expected(conv, own, x).tanh()
    assert fold_norms(conv) == 1 and conv.norm is None
    torch.testing.assert_close(conv(x), wanted, rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in conv.parameters())


@torch.no_grad()
def test_activation_in_a_norm_of_timm_is_kept() -> None:
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    own = with_statistics(layers.BatchNormAct2d(8))
    tower = nn.Sequential(nn.Conv2d(4, 8, 3), own, nn.Conv2d(8, 8, 1))
    x = torch.randn(2, 4, 9, 9)
    wanted = tower[2](expected(tower[0], own, x).relu())
    assert fold_norms(tower) == 1
    torch.testing.assert_close(tower(x), wanted, rtol=1e-5, atol=1e-5)


# With the norms that stay: of GhostNet the one whose convolution's output is itself a feature, of
# ResNet-v2 those that are fed with a sum, of RepViT those without a convolution.
NETS = {
    "test_efficientnet": 0,
    "mobilenetv3_small_050": 0,
    "resnet10t": 0,
    "ghostnet_050": 1,
    "resnetv2_50": 16,
    "repvit_m0_9": 23,
}


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_norms_in_blocks_of_timm_are_folded_and_features_stay(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model(name, features_only=True).eval()
    norms = [x for x in net.modules() if isinstance(x, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 2)
    x = torch.randn(1, 3, 64, 96)
    before = net(x)
    assert fold_norms(net) == len(norms) - NETS[name]
    for feature, wanted in zip(net(x), before):
        torch.testing.assert_close(feature, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    assert fold_norms(net) == 0, "there is nothing left to fold"


@pytest.mark.parametrize("name", ["test_efficientnet", "mobilenetv3_small_050", "resnet10t"])
@torch.no_grad()
def test_norms_of_a_backbone_that_is_a_teacher_are_folded(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    net = timm.create_model(name).eval()
    for norm in net.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 2)
    teacher = BackboneTeacher(net, [8, 16, 32]).eval()
    x = torch.randn(1, 3, 64, 96)
    before = teacher.backbone(x)
    assert fold_norms(teacher) > 5
    for level, found in teacher.backbone(x).items():
        atol = 1e-5 * before[level].abs().max().item()
        torch.testing.assert_close(found, before[level], rtol=0, atol=atol)


@pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
@torch.no_grad()
def test_norm_behind_a_convolution_is_folded_and_what_follows_keeps_its_place(norm: str) -> None:
    torch.manual_seed(0)
    own = with_statistics(NORMS[norm](8))
    tower = nn.Sequential(nn.Conv2d(4, 8, 3), own, nn.ReLU())
    x = torch.randn(2, 4, 9, 9)
    wanted = expected(tower[0], own, x).relu()
    assert fold_norms(tower) == 1 and isinstance(tower[2], nn.ReLU) and len(tower) == 3
    torch.testing.assert_close(tower(x), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Conv2d(4, 8, 3, norm=nn.GroupNorm(2, 8)),
        lambda: Conv2d(4, 8, 3, norm=nn.BatchNorm2d(8)).train(),
        lambda: Conv2d(4, 8, 3, norm=nn.BatchNorm2d(8, track_running_stats=False)).eval(),
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)).eval(),
        lambda: nn.Sequential(Conv2d(4, 8, 3, activation=torch.relu), nn.BatchNorm2d(8)).eval(),
    ],
    ids=["group norm", "training", "statistics of the batch", "behind a ReLU", "activation"],
)
def test_norm_that_is_not_fixed_or_not_next_stays(build: Callable[[], nn.Module]) -> None:
    model = build()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert fold_norms(model) == 0
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
