"""What the Distiller promises: the student is untouched, the teacher is frozen and hidden."""

import hashlib
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
import torch
from torch import nn

import detectron2.modeling
from detectron2.config import CfgNode
from detectron2.modeling import BACKBONE_REGISTRY, build_model
from detectron2.modeling.backbone.fpn import build_retinanet_resnet_fpn_backbone
from detectron2.structures import BitMasks, Instances
from detectron2.utils.events import EventStorage

from d2kd import student_config
from d2kd.engine.optimizer import build_optimizer
from tests.helpers.toys import DETECTORS, batch, distill_config, write_teacher

FAMILIES = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name == "fcos" and not hasattr(detectron2.modeling, "FCOS"),
            reason="this Detectron2 has no FCOS",
        ),
    )
    for name in DETECTORS
]
SHOW_ALL = {  # random networks are sure of nothing
    "MODEL__RETINANET__SCORE_THRESH_TEST": 0.0,
    "MODEL__ROI_HEADS__SCORE_THRESH_TEST": 0.0,
    "MODEL__FCOS__SCORE_THRESH_TEST": 0.0,
    "MODEL__REPPOINTS__SCORE_THRESH_TEST": 0.0,
}


@BACKBONE_REGISTRY.register()
def build_dropout_test_backbone(cfg: CfgNode, input_shape: Any) -> nn.Module:
    backbone = build_retinanet_resnet_fpn_backbone(cfg, input_shape)
    backbone.bottom_up.stem = nn.Sequential(backbone.bottom_up.stem, nn.Dropout(0.5))
    return backbone


@BACKBONE_REGISTRY.register()
def build_divisible_by_64_test_backbone(cfg: CfgNode, input_shape: Any) -> nn.Module:
    backbone = build_retinanet_resnet_fpn_backbone(cfg, input_shape)
    backbone._size_divisibility = 64
    return backbone


@pytest.fixture(scope="module")
def retinanet(tmp_path_factory: pytest.TempPathFactory) -> List[Any]:
    """Options of a RetinaNet teacher, twice as wide as the student."""
    return write_teacher(tmp_path_factory.mktemp("t"), "retinanet", MODEL__FPN__OUT_CHANNELS=64)


@pytest.fixture(scope="module")
def faster_rcnn(tmp_path_factory: pytest.TempPathFactory) -> List[Any]:
    return write_teacher(tmp_path_factory.mktemp("t"), "faster_rcnn", MODEL__FPN__OUT_CHANNELS=64)


def build(cfg: CfgNode) -> nn.Module:
    torch.manual_seed(3)
    return build_model(cfg).train()


def losses_of(model: nn.Module, inputs: List[Dict[str, Any]]) -> Dict[str, torch.Tensor]:
    torch.manual_seed(5)  # for proposals and masks
    with EventStorage():
        return model(inputs)


def gradients(model: nn.Module) -> Dict[str, torch.Tensor]:
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


def with_masks(inputs: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Add a mask that fills the box to each object."""
    for x in inputs:
        masks = torch.zeros(len(x["instances"]), x["height"], x["width"], dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(masks, x["instances"].gt_boxes.tensor.long().tolist()):
            mask[y0:y1, x0:x1] = True
        x["instances"].gt_masks = BitMasks(masks)
    return inputs


def fingerprint(module: nn.Module) -> str:
    """Of every parameter and buffer, saved or not."""
    digest = hashlib.sha256()
    for x in [*module.parameters(), *module.buffers()]:
        digest.update(x.detach().numpy().tobytes())
    return digest.hexdigest()


def assert_same_detections(actual: Instances, expected: Instances) -> None:
    assert len(actual) == len(expected) > 0
    for name, value in expected.get_fields().items():
        other = actual.get(name)
        if name == "pred_boxes":
            value, other = value.tensor, other.tensor
        assert torch.equal(value, other), name


# The student -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_student_has_the_losses_and_detections_that_it_has_alone(
    name: str, retinanet: List[Any]
) -> None:
    cfg = distill_config(name, retinanet, ["MGD", "PKD"], **SHOW_ALL)
    cfg.INPUT.MASK_FORMAT = "bitmask"
    distiller, alone = build(cfg), build(student_config(cfg))
    inputs = with_masks(batch(height=64, width=96))
    for _ in range(2):  # the second time with other BatchNorm statistics and loss normalisers
        losses, expected = losses_of(distiller, inputs), losses_of(alone, inputs)
        assert set(losses) - set(expected) == {"loss_mgd", "loss_pkd"}
        for key, value in expected.items():
            assert torch.equal(losses[key], value), key
    distiller.eval(), alone.eval()
    for key, value in alone.state_dict().items():
        assert torch.equal(distiller.student.state_dict()[key], value), key
    for actual, wanted in zip(distiller(inputs), alone(inputs)):
        assert_same_detections(actual["instances"], wanted["instances"])


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn"])
def test_student_gets_the_gradient_of_its_own_losses_and_of_the_heads(
    name: str, retinanet: List[Any]
) -> None:
    cfg = distill_config(name, retinanet, ["MGD", "PKD"])
    distiller, alone = build(cfg), build(student_config(cfg))
    sum(losses_of(alone, batch()).values()).backward()
    losses = losses_of(distiller, batch())
    sum(v for k, v in losses.items() if k in ("loss_mgd", "loss_pkd")).backward(retain_graph=True)
    from_heads = gradients(distiller.student)
    distiller.zero_grad()
    sum(losses.values()).backward()
    for key, gradient in gradients(distiller.student).items():
        expected = gradients(alone)[key] + from_heads.get(key, 0)
        # Sums in another order: compared with the largest entry, for some entries cancel out.
        largest = expected.abs().max().item()
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 + 1e-3 * largest)


def test_hooks_are_gone_after_the_forward_even_where_it_fails(retinanet: List[Any]) -> None:
    distiller = build(distill_config("retinanet", retinanet))
    broken = batch()
    broken[0]["instances"].remove("gt_boxes")
    with pytest.raises((AttributeError, KeyError)):
        losses_of(distiller, broken)
    losses_of(distiller, batch())
    assert not any(m._forward_hooks for m in distiller.student.modules())


def test_step_of_training_is_forgotten_in_eval_mode(retinanet: List[Any]) -> None:
    """Its maps are the largest part of what training needs of the memory."""
    distiller = build(distill_config("retinanet", retinanet))
    losses_of(distiller, batch())
    assert distiller.last_step is not None
    distiller.eval()(batch())
    assert distiller.last_step is None


def test_disabled_distiller_has_no_teacher_no_heads_and_the_student_s_losses(
    retinanet: List[Any],
) -> None:
    cfg = distill_config("retinanet", retinanet, DISTILL__ENABLED=False)
    cfg.DISTILL.TEACHER.CONFIG_FILE = "nowhere.yaml"
    distiller, alone = build(cfg), build(student_config(cfg))
    losses, expected = losses_of(distiller, batch()), losses_of(alone, batch())
    assert losses == expected
    assert distiller.teacher is None and not list(distiller.heads.parameters())


# The teacher -------------------------------------------------------------------------------------


def test_teacher_is_in_no_state_dict_no_parameter_list_and_no_optimizer(
    retinanet: List[Any],
) -> None:
    cfg = distill_config("retinanet", retinanet, ["MGD", "PKD"])
    distiller = build(cfg)
    teacher = distiller.teacher.model
    hidden = {id(x) for x in [*teacher.parameters(), *teacher.buffers()]}
    optimizer = build_optimizer(cfg, distiller)
    seen = {
        "parameters": distiller.parameters(),
        "buffers": distiller.buffers(),
        "state_dict": distiller.state_dict(keep_vars=True).values(),
        "optimizer": [p for group in optimizer.param_groups for p in group["params"]],
    }
    for where, tensors in seen.items():
        assert not [x for x in tensors if id(x) in hidden], where
    assert {k.split(".")[0] for k in distiller.state_dict()} == {"student", "heads"}
    assert teacher not in list(distiller.modules())


def test_optimizer_has_every_parameter_of_student_and_heads(retinanet: List[Any]) -> None:
    cfg = distill_config("retinanet", retinanet, ["MGD", "PKD"])
    distiller = build(cfg)
    optimizer = build_optimizer(cfg, distiller)
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in distiller.parameters() if p.requires_grad}


def test_teacher_follows_to_another_type_and_device(retinanet: List[Any]) -> None:
    distiller = build(distill_config("retinanet", retinanet)).double()
    assert {p.dtype for p in distiller.teacher.model.parameters()} == {torch.float64}
    distiller.to("meta")  # a second device that every machine has
    everything = [*distiller.teacher.model.parameters(), *distiller.teacher.model.buffers()]
    assert {x.device.type for x in everything} == {"meta"}


@pytest.mark.parametrize("recurse", [True, False])
def test_teacher_is_emptied_with_all_children(recurse: bool, retinanet: List[Any]) -> None:
    distiller = build(distill_config("retinanet", retinanet)).to("meta")
    distiller.to_empty(device="cpu", recurse=recurse)
    expected = {"cpu" if recurse else "meta"}
    for model in (distiller.student, distiller.teacher.model):
        assert {x.device.type for x in model.parameters()} == expected


def test_train_leaves_a_teacher_in_eval_mode_that_was_switched_by_hand(
    retinanet: List[Any],
) -> None:
    distiller = build(distill_config("retinanet", retinanet))
    for mode in (True, False):
        distiller.teacher.model.train()
        assert distiller.train(mode) is distiller
        assert not any(m.training for m in distiller.teacher.model.modules())
        assert distiller.student.training == mode


@pytest.mark.parametrize("student", ["retinanet", "faster_rcnn"])
def test_teacher_with_batch_norm_is_bit_identical_after_training(
    student: str, faster_rcnn: List[Any]
) -> None:
    cfg = distill_config(student, faster_rcnn, ["MGD", "PKD"], SOLVER__BASE_LR=0.01)
    distiller = build(cfg)
    teacher = distiller.teacher.model
    assert any(isinstance(m, nn.BatchNorm2d) for m in teacher.modules())
    optimizer = build_optimizer(cfg, distiller)
    before, student_before = fingerprint(teacher), fingerprint(distiller.student)
    for i in range(3):
        optimizer.zero_grad()
        sum(losses_of(distiller, batch(seed=i)).values()).backward()
        optimizer.step()
    assert fingerprint(teacher) == before
    assert fingerprint(distiller.student) != student_before
    assert all(p.grad is None for p in teacher.parameters())


def test_teacher_with_dropout_is_deterministic(tmp_path: Path) -> None:
    teacher = write_teacher(
        tmp_path, "retinanet", MODEL__BACKBONE__NAME="build_dropout_test_backbone"
    )
    distiller = build(distill_config("retinanet", teacher))
    features = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        with EventStorage():
            distiller(batch())
        features.append(distiller.last_step.teacher.features)
    for level, x in features[0].items():
        assert torch.equal(x, features[1][level]) and not x.requires_grad


# Gradients and inputs ----------------------------------------------------------------------------


def test_gradients_of_a_head_reach_backbone_adapter_and_generator_only(
    retinanet: List[Any],
) -> None:
    distiller = build(distill_config("retinanet", retinanet))
    losses_of(distiller, batch())["loss_mgd"].backward()
    for key, p in distiller.heads.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, key
    backbone = distiller.student.backbone
    assert all(p.grad is not None for p in backbone.bottom_up.parameters())
    assert sum(p.grad.abs().sum() for p in backbone.bottom_up.parameters()) > 0
    assert all(p.grad is None for p in distiller.student.head.parameters())


def test_levels_that_are_not_distilled_get_no_gradient_from_the_head(
    retinanet: List[Any],
) -> None:
    cfg = distill_config("retinanet", retinanet, DISTILL__LEVELS=[["p4", "p4"]])
    distiller = build(cfg)
    loss = losses_of(distiller, batch())["loss_mgd"]
    features = distiller.last_step.student.features
    for x in features.values():
        x.retain_grad()
    loss.backward()
    assert [k for k, x in features.items() if x.grad is not None] == ["p4"]


def test_level_that_only_a_head_reads_which_is_off_is_not_computed(retinanet: List[Any]) -> None:
    heads = ["PKD", "CWD"]
    distiller = build(distill_config("retinanet", retinanet, heads, DISTILL__PKD__NUM_LEVELS=2))
    computed = []
    for weight in (1.0, 0.0):
        distiller.schedules["CWD"] = lambda iteration: weight
        losses_of(distiller, batch())
        levels = distiller.last_step.teacher.features._levels
        computed.append([level for level, x in levels.items() if x.is_there])
    assert computed == [["p3", "p4", "p5", "p6", "p7"], ["p3", "p4"]]


# Every head: in the conformance kit.
@pytest.mark.parametrize("student", ["retinanet", "faster_rcnn"])
def test_a_batch_without_any_box_trains(student: str, retinanet: List[Any]) -> None:
    distiller = build(distill_config(student, retinanet, ["MGD", "SGFI"]))
    losses = losses_of(distiller, batch(boxes=0))
    assert all(x.isfinite() for x in losses.values()), losses
    sum(losses.values()).backward()
    # Connected, so that no process of a DDP run waits for another's gradient.
    assert all(p.grad is not None for p in distiller.heads.parameters() if p.requires_grad)


@pytest.mark.parametrize("student", ["retinanet", "faster_rcnn"])
def test_images_of_different_sizes_train_in_one_batch(student: str, retinanet: List[Any]) -> None:
    distiller = build(distill_config(student, retinanet, ["MGD", "PKD"]))
    inputs = batch(1, height=64, width=96) + batch(1, height=80, width=50)
    losses = losses_of(distiller, inputs)
    views = distiller.last_step.student, distiller.last_step.teacher
    assert [v.image_size for v in views] == [(96, 96)] * 2
    assert [v.image_sizes for v in views] == [[(64, 96), (80, 50)]] * 2
    sum(losses.values()).backward()


def test_detectors_of_different_size_divisibility_train_together(tmp_path: Path) -> None:
    teacher = write_teacher(
        tmp_path, "retinanet", MODEL__BACKBONE__NAME="build_divisible_by_64_test_backbone"
    )
    distiller = build(distill_config("retinanet", teacher, ["MGD", "PKD"]))
    losses = losses_of(distiller, batch(height=64, width=90))
    assert distiller.last_step.student.image_size == (64, 96)
    assert distiller.last_step.teacher.image_size == (64, 128)
    sum(losses.values()).backward()
    assert all(x.isfinite() for x in losses.values())


@pytest.mark.parametrize(
    "output, message",
    [
        (torch.zeros(()), 'PKD: forward returns Tensor .* a dict such as {"loss_pkd": scalar}'),
        (None, "PKD: forward returns NoneType None; it must return a dict"),
        ({"pkd": torch.zeros(())}, "PKD: .* the key 'pkd'; all keys must start with \"loss_\""),
        ({"loss_pkd": torch.zeros(2)}, r"PKD: loss_pkd is \(2,\); reduce it to a tensor"),
        ({"loss_pkd": [torch.zeros(())]}, "PKD: loss_pkd is list; it must be a tensor"),
        ({"loss_pkd": {"p3": 0.5}}, r"PKD: loss_pkd\['p3'\] is float; it must be a tensor"),
        ({"loss_pkd": {}}, "PKD: loss_pkd is an empty dict; it must have at least one level"),
    ],
)
def test_what_is_no_loss_is_told_with_the_head_s_name(
    output: Any, message: str, retinanet: List[Any]
) -> None:
    distiller = build(distill_config("retinanet", retinanet, ["PKD"]))
    distiller.heads["PKD"].forward = lambda student, teacher: output
    with pytest.raises(ValueError, match=message):
        losses_of(distiller, batch())


def test_every_weight_is_applied_once(retinanet: List[Any]) -> None:
    losses = {}
    for weight in (1e-4, 3e-4):
        cfg = distill_config("retinanet", retinanet, DISTILL__MGD__LOSS_WEIGHT=weight)
        distiller = build(cfg)
        losses[weight] = losses_of(distiller, batch())["loss_mgd"]
        terms = distiller.last_step.losses["loss_mgd"]
        assert list(terms) == ["p3", "p4", "p5", "p6", "p7"]
        torch.testing.assert_close(losses[weight], sum(terms.values()) * weight)
    np.testing.assert_allclose(float(losses[3e-4]), 3 * float(losses[1e-4]), rtol=1e-5)


@pytest.mark.parametrize("head", ["MGD", "AMD", "DMKD", "SAMKD"])
def test_reference_pixels_scale_a_sum_over_cells_by_the_size_of_the_images(
    head: str, retinanet: List[Any]
) -> None:
    # Images and not their padding count, as in the published setting of 800 x 1333 padded to 1344.
    inputs = batch(1, height=64, width=64) + batch(1, height=32, width=96)  # 3584 on average
    terms = []
    for pixels in (0, 2 * 3584):
        values = {f"DISTILL__{head}__REFERENCE_PIXELS": pixels}
        distiller = build(distill_config("retinanet", retinanet, [head], **values))
        losses_of(distiller, inputs)
        (levels,) = distiller.last_step.losses.values()
        terms.append(torch.stack(list(levels.values())))
    torch.testing.assert_close(terms[1], 2 * terms[0])
