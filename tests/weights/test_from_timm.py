"""timm's own weights, by file or from its hub, in the backbone of a detector."""

import logging
from pathlib import Path
from typing import Any, Dict

import pytest
import torch
from torch import Tensor, nn

from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from d2kd.checkpoint import PlainCheckpointer, load_initial_weights, load_whole_detector
from tests.helpers.runs import assert_same_tensors
from tests.helpers.toys import detector_config

timm = pytest.importorskip("timm")

# ImageNet's, as test_efficientnet was trained.
NORMALISED = {
    "INPUT__FORMAT": "RGB",
    "MODEL__PIXEL_MEAN": [123.675, 116.28, 103.53],
    "MODEL__PIXEL_STD": [58.395, 57.12, 57.375],
}
HALF = {
    "INPUT__FORMAT": "RGB",
    "MODEL__PIXEL_MEAN": [127.5] * 3,
    "MODEL__PIXEL_STD": [127.5] * 3,
}


def detector(net: str = "test_efficientnet", **overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    keys = {
        "MODEL__BACKBONE__NAME": "build_retinanet_timm_fpn_backbone",
        "MODEL__TIMM__NAME": net,
        **(overrides or NORMALISED),
    }
    return build_model(detector_config("retinanet", **keys))


def trained(net: str = "test_efficientnet") -> nn.Module:
    """The whole classifier, with statistics that are not those of a new one."""
    torch.manual_seed(5)
    model = timm.create_model(net)
    for x in model.modules():
        if isinstance(x, nn.BatchNorm2d):
            nn.init.uniform_(x.running_mean)
            nn.init.uniform_(x.running_var, 1, 2)
    return model.eval()


def save(state: Dict[str, Tensor], path: Path) -> str:
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(state, str(path))
    else:
        torch.save(state, path)
    return str(path)


# Each with other ways of naming stages in timm's features.
@pytest.mark.parametrize(
    "net, images, suffix",
    [
        ("test_efficientnet", NORMALISED, ".pth"),
        ("test_resnet", HALF, ".safetensors"),
        ("test_convnext", HALF, ".pth"),
    ],
)
def test_backbone_computes_what_the_classifier_computes(
    net: str, images: Any, suffix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    classifier, student = trained(net), detector(net, **images).eval()
    path = save(classifier.state_dict(), tmp_path / f"x{suffix}")
    head = {k: v.clone() for k, v in student.state_dict().items() if "bottom_up" not in k}
    with caplog.at_level(logging.INFO, logger="d2kd"):
        load_initial_weights(PlainCheckpointer(student), path)
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = classifier.forward_intermediates(image, intermediates_only=True)[-1]
        found = student.backbone.bottom_up(image)["stride32"]
    torch.testing.assert_close(found, expected)
    assert_same_tensors({k: student.state_dict()[k] for k in head}, head)
    assert f"has the whole backbone, {net} of timm" in caplog.text
    whole = sum(1 for _ in student.backbone.bottom_up.parameters())
    assert f"backbone {whole} of {whole}" in caplog.text


def test_each_tensor_that_is_missing_or_of_another_shape_is_named(tmp_path: Path) -> None:
    state = trained().state_dict()
    del state["blocks.1.0.conv_pwl.weight"]
    state["conv_stem.weight"] = state["conv_stem.weight"][:4]
    path = save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError) as error:
        load_initial_weights(PlainCheckpointer(detector()), path)
    for text in (
        "MODEL.TIMM.NAME",
        "blocks.1.0.conv_pwl.weight",
        "conv_stem.weight ((4, 3, 3, 3) in the file, (24, 3, 3, 3) in the model)",
    ):
        assert text in str(error.value)


def test_another_model_of_the_family_is_refused(tmp_path: Path) -> None:
    state = timm.create_model("mobilenetv2_035").state_dict()
    with pytest.raises(ValueError, match=r"not of the model that MODEL\.TIMM\.NAME \(of"):
        load_initial_weights(PlainCheckpointer(detector()), save(state, tmp_path / "x.pth"))


def test_counters_that_older_files_lack_are_not_missed(tmp_path: Path) -> None:
    state = {k: v for k, v in trained().state_dict().items() if "num_batches" not in k}
    load_initial_weights(PlainCheckpointer(detector()), save(state, tmp_path / "x.pth"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"INPUT__FORMAT": "BGR"},
        {"MODEL__PIXEL_MEAN": [103.53, 116.28, 123.675]},
        {"MODEL__PIXEL_STD": [1.0, 1.0, 1.0]},
    ],
)
def test_images_unlike_those_of_the_weights_are_refused_with_what_to_set(
    wrong: Any, tmp_path: Path
) -> None:
    path = save(trained().state_dict(), tmp_path / "x.pth")
    remedy = (
        r'INPUT\.FORMAT "RGB" MODEL\.PIXEL_MEAN "\[123\.675, 116\.28, 103\.53\]" '
        r'MODEL\.PIXEL_STD "\[58\.395, 57\.12, 57\.375\]"; now it is'
    )
    with pytest.raises(ValueError, match=remedy):
        load_initial_weights(PlainCheckpointer(detector(**{**NORMALISED, **wrong})), path)


def test_roundings_of_the_mean_are_taken(tmp_path: Path) -> None:
    path = save(trained().state_dict(), tmp_path / "x.pth")
    rounded = {**NORMALISED, "MODEL__PIXEL_MEAN": [123.7, 116.3, 103.5]}
    load_initial_weights(PlainCheckpointer(detector(**rounded)), path)


def test_checkpoint_of_the_detector_itself_is_read_as_ever(tmp_path: Path) -> None:
    own, other = detector(), detector(INPUT__FORMAT="BGR")
    nn.init.ones_(own.backbone.bottom_up.net.conv_stem.weight)
    torch.save({"model": own.state_dict()}, tmp_path / "x.pth")
    load_whole_detector(other, str(tmp_path / "x.pth"), "KEY")
    assert_same_tensors(other.state_dict(), own.state_dict())


# The hub: its answers are played, since no test reaches a network ---------------------------------


def test_hub_weights_are_loaded_by_their_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked, classifier = [], trained()
    path = save(classifier.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *x: asked.append(x) or path)
    student = detector()
    load_initial_weights(PlainCheckpointer(student), "timm://test_efficientnet.r160_in1k")
    assert asked == [("timm/test_efficientnet.r160_in1k", "model.safetensors")]
    assert torch.equal(student.backbone.bottom_up.net.conv_stem.weight, classifier.conv_stem.weight)


def test_hub_that_cannot_be_reached_is_told_with_another_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(
        OSError, match=r"MODEL\.WEIGHTS: 'timm://.*no network\. Without a network, download"
    ):
        load_initial_weights(PlainCheckpointer(detector()), "timm://test_efficientnet.r160_in1k")


@pytest.mark.parametrize("name", ["no_such_net", "test_efficientnet.no_such_tag"])
def test_name_that_timm_does_not_know_is_refused(name: str) -> None:
    with pytest.raises(OSError, match=f"MODEL.WEIGHTS: .*knows no weights of the name '{name}'"):
        load_initial_weights(PlainCheckpointer(detector()), f"timm://{name}")


def test_hub_address_is_no_open_file() -> None:
    with pytest.raises(OSError, match="knows no weights"):
        PathManager.open("timm://no_such_net")
