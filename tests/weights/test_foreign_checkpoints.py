"""Checkpoints of other tools, and files that are none: read where the names fit, else explained."""

import argparse
import datetime
import json
import logging
import pickle
import re
import tarfile
import zipfile
from pathlib import Path
from typing import Any, Callable, Dict

import numpy as np
import pytest
import torch
from torch import nn

from detectron2.modeling import build_model

from d2kd.checkpoint import PlainCheckpointer, load_initial_weights, load_whole_detector
from d2kd.weights.run_checkpoints import last_whole_checkpoint
from tests.helpers.runs import assert_same_tensors, build_trainer, run_config, snapshot
from tests.helpers.toys import detector_config, stock_backbone

State = Dict[str, Any]
# Most parameters of a backbone are the ResNet's, as in a detector that is no toy.
WHOLE = stock_backbone("retinanet")


@pytest.fixture(scope="module")
def detector() -> nn.Module:
    torch.manual_seed(3)
    return build_model(detector_config("retinanet", **WHOLE))


@pytest.fixture(autouse=True)
def unchanged(detector: nn.Module) -> Any:
    """Whatever a test loads, the next one starts from the same weights."""
    before = snapshot(detector)
    yield
    detector.load_state_dict(before)


def other_weights() -> State:
    torch.manual_seed(4)
    return build_model(detector_config("retinanet", **WHOLE)).state_dict()


def prefixed(state: State, prefix: str) -> State:
    return {prefix + k: v for k, v in state.items()}


def mm_names(state: State) -> State:
    """As mmdetection calls a ResNet: backbone.layer1.0.conv1.weight."""
    kept = {k: v for k, v in state.items() if ".res" in k}
    return {k.replace("bottom_up.res2", "layer1"): v for k, v in kept.items() if ".res2." in k}


# Read, as the names fit ---------------------------------------------------------------------------

CONTAINERS: Dict[str, Callable[[State], Any]] = {
    "bare": lambda x: x,
    "data_parallel": lambda x: {"model": prefixed(x, "module.")},
    "openmmlab": lambda x: {"meta": {"epoch": 1}, "state_dict": x, "optimizer": {"state": {}}},
    "lightning": lambda x: {
        "state_dict": prefixed(x, "model."),
        "pytorch-lightning_version": "2.4.0",
        "hyper_parameters": {"lr": 0.1},
        "epoch": 3,
    },
    "tutorial": lambda x: {"epoch": 1, "model_state_dict": x, "loss": 0.5},
    "distributed_lightning": lambda x: {"state_dict": prefixed(x, "module.model.student.")},
    "compiled": lambda x: {"model": prefixed(x, "_orig_mod.")},
    "ema_beside": lambda x: {"model": x, "ema_state": {k: v * 0 for k, v in x.items()}},
    "numpy": lambda x: {"state_dict": {k: v.numpy() for k, v in x.items()}},
}


@pytest.mark.parametrize("name", [x for x in CONTAINERS if x != "numpy"])
def test_weights_of_detectron2_names_are_read_from_any_container(
    name: str, detector: nn.Module, tmp_path: Path
) -> None:
    state, path = other_weights(), tmp_path / "x.pth"
    torch.save(CONTAINERS[name](state), path)
    load_whole_detector(detector, str(path), "KEY")
    assert_same_tensors(detector.state_dict(), state)
    nn.init.zeros_(detector.head.cls_score.weight)
    load_initial_weights(PlainCheckpointer(detector), str(path))
    assert_same_tensors(detector.state_dict(), state)


def test_backbone_alone_is_read_where_its_names_may_be_ends(
    detector: nn.Module, tmp_path: Path
) -> None:
    torch.manual_seed(4)
    backbone = build_model(detector_config("retinanet", **WHOLE)).backbone.bottom_up
    torch.save(backbone.state_dict(), tmp_path / "x.pth")
    path = f"{tmp_path}/x.pth?matching_heuristics=True"
    load_initial_weights(PlainCheckpointer(detector), path)
    assert_same_tensors(detector.backbone.bottom_up.state_dict(), backbone.state_dict())


def test_weights_that_are_left_aside_are_told(
    detector: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "x.pth"
    torch.save(CONTAINERS["ema_beside"](other_weights()), path)
    with caplog.at_level(logging.WARNING, logger="d2kd"):
        load_whole_detector(detector, str(path), "KEY")
    assert "'model' is read; it also has weights under ['ema_state']" in caplog.text


# Refused, with what was found ---------------------------------------------------------------------

NAMES: Dict[str, Any] = {
    "openmmlab": (
        lambda x: {"meta": {}, "state_dict": mm_names(x), "optimizer": {}},
        r"mmdetection \(OpenMMLab\): \d+ tensors such as backbone\.layer1\..*renames no weights",
    ),
    "torchvision": (
        lambda x: {"layer1.0.conv1.weight": torch.zeros(2), "fc.bias": torch.zeros(2)},
        r"2 tensors such as layer1\.0\.conv1\.weight, fc\.bias.*convert-torchvision-to-d2\.py",
    ),
    "detr": (
        lambda x: {"model": {"transformer.a": torch.zeros(2)}, "lr_scheduler": {}, "epoch": 2},
        r"1 tensors such as transformer\.a",
    ),
    "merged": (
        lambda x: {"model": {**prefixed(x, "student."), **prefixed(x, "teacher.")}},
        r"of its names would fit without '(student|teacher)\.'",
    ),
    "backbone": (
        lambda x: {k[len("backbone.bottom_up.") :]: v for k, v in x.items() if "bottom_up" in k},
        r"ends of the model's.*\?matching_heuristics=True",
    ),
    "wrapped": (
        lambda x: {"state_dict": {**prefixed(x, "model."), "criterion.weight": torch.zeros(2)}},
        r"of its names would fit without 'model\.'",
    ),
}
CONTENTS: Dict[str, Any] = {
    "two_sets": (
        lambda x: {"student": x, "teacher": x},
        r"several sets of weights: 'student' \(\d+ tensors\), 'teacher'",
    ),
    "nested": (lambda x: {"model": {"student": x}}, "it has 'student', a dict, where a tensor"),
    "number": (lambda x: {"model": {**x, "epoch": 3}}, "it has 'epoch', a int, where a tensor"),
    "no_weights": (lambda x: {"epoch": 3, "optimizer": {}}, r"no named weights, but 'epoch' \(int"),
    "nothing": (lambda x: {}, "no named weights, but nothing"),
    "tensor": (lambda x: torch.zeros(3), "it holds a Tensor"),
    "list": (lambda x: [x], "it holds a list"),
    "numpy": (CONTAINERS["numpy"], "numpy.*its weights alone"),
    "namespace": (
        lambda x: {"model": x, "args": argparse.Namespace(lr=1)},
        r"more than named weights: argparse\.Namespace",
    ),
    "date": (
        lambda x: {"meta": {"time": datetime.datetime(2024, 1, 1)}, "state_dict": x},
        r"more than named weights: datetime\.datetime",
    ),
    "whole_model": (
        lambda x: nn.Sequential(nn.Conv2d(1, 1, 1)),
        r"a whole model, not its named weights: torch\.nn\.modules\.container\.Sequential",
    ),
    "model_in_a_dict": (
        lambda x: {"epoch": -1, "model": nn.Sequential(nn.Conv2d(1, 1, 1))},
        r"a whole model, not its named weights",
    ),
}


def assert_says(message: str, expected: str) -> None:
    assert re.search(expected, message, re.DOTALL), message


def refusals(detector: nn.Module, path: Path) -> Any:
    """What is said of a file by each who reads one, with the key that named it."""
    checkpointer = PlainCheckpointer(detector)
    for key, load in [
        ("MODEL.WEIGHTS", lambda: load_initial_weights(checkpointer, str(path))),
        ("--weights", lambda: load_whole_detector(detector, str(path), "--weights")),
    ]:
        with pytest.raises(ValueError) as error:
            load()
        message = str(error.value)
        assert message.startswith(f"{key}: ") and path.name in message
        chain = [error.value, error.value.__cause__, error.value.__context__]
        for said in map(str, chain):  # also in the traceback
            assert "weights_only" not in said and "safe_globals" not in said, said
        yield message


@pytest.mark.parametrize("name", NAMES)
def test_names_of_other_projects_are_refused_with_what_was_found(
    name: str, detector: nn.Module, tmp_path: Path
) -> None:
    make, expected = NAMES[name]
    path = tmp_path / "other.pth"
    torch.save(make(other_weights()), path)
    before = snapshot(detector)
    for message in refusals(detector, path):
        assert_says(message, expected)
    assert_same_tensors(detector.state_dict(), before)


@pytest.mark.parametrize("older_format", [False, True])
@pytest.mark.parametrize("name", CONTENTS)
def test_content_that_is_not_one_set_of_weights_is_refused(
    name: str, older_format: bool, detector: nn.Module, tmp_path: Path
) -> None:
    make, expected = CONTENTS[name]
    path = tmp_path / "other.pth"
    state = {"head.cls_score.bias": torch.zeros(9)}
    torch.save(make(state), path, _use_new_zipfile_serialization=not older_format)
    for message in refusals(detector, path):
        assert_says(message, expected)


# Files that are no checkpoints --------------------------------------------------------------------


def write_text(path: Path, text: str) -> None:
    path.write_text(text)


def write_half_of_safetensors(path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(2))


def write_tar(path: Path) -> None:
    with tarfile.open(path, "w") as file:
        file.add(__file__, "a.pth")


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("folder/model.pth", b"x")


def write_half(path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1000)}}, path)
    path.write_bytes(path.read_bytes()[:800])


FILES: Dict[str, Any] = {
    "page.pth": (lambda p: write_text(p, "\n<!DOCTYPE html><html>"), "is a web page: download"),
    "page.pkl": (lambda p: write_text(p, "<html>"), "is a web page: download"),
    "pointer.pth": (
        lambda p: write_text(p, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "Git LFS pointer: `git lfs pull`",
    ),
    "note.pth": (lambda p: write_text(p, "see the wiki"), "text that begins with 'see the wiki'"),
    "empty.pth": (lambda p: write_text(p, ""), "is empty"),
    "empty.pkl": (lambda p: write_text(p, ""), "is empty"),
    "half.pth": (write_half, "its end is missing"),
    "x.safetensors": (
        write_half_of_safetensors,
        "begins as a safetensors file|is a safetensors file, and that package is not installed",
    ),
    "x.tar": (write_tar, "a tar archive: unpack it"),
    "x.zip": (write_zip, r"a zip archive of model\.pth: unpack it"),
    "x.npz": (lambda p: np.savez(p, x=np.zeros(2)), r"a zip archive of x\.npy"),
    "x.h5": (lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n"), "an HDF5 file"),
    "x.onnx": (lambda p: p.write_bytes(b"\x08\x08\x12\x07pytorch\x1a"), "an ONNX graph"),
    "graph.pt": (
        lambda p: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(p)),
        "a TorchScript archive",
    ),
    "random.pth": (lambda p: p.write_bytes(bytes(range(256))), "not what torch.save writes"),
    "arrays.pth": (
        lambda p: p.write_bytes(pickle.dumps({"model": {"a": np.zeros(2)}})),
        r"a pickle of arrays, not a file of torch\.save: name it \.pkl",
    ),
    "tensors.pkl": (
        lambda p: torch.save({"a": torch.zeros(2)}, p),
        r"a file of torch\.save: name it \.pth",
    ),
    "nested.pkl": (
        lambda p: p.write_bytes(pickle.dumps({"params": {"conv1_w": np.zeros(2)}})),
        "it has 'params', a dict, where a tensor should be",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_file_of_another_kind_is_refused_as_what_it_is(
    name: str, detector: nn.Module, tmp_path: Path
) -> None:
    write, expected = FILES[name]
    write(tmp_path / name)
    for message in refusals(detector, tmp_path / name):
        assert_says(message, expected)


def test_folder_is_refused_with_what_could_be_named(detector: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "model_final.pth").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"KEY: .* is a folder; name .*model_final\.pth"):
        load_whole_detector(detector, str(tmp_path), "KEY")


# How much of the student is covered ---------------------------------------------------------------


def load_part(detector: nn.Module, path: Path, keep: Callable[[str], bool]) -> None:
    torch.save({"model": {k: v for k, v in other_weights().items() if keep(k)}}, path)
    load_initial_weights(PlainCheckpointer(detector), str(path))


def test_coverage_of_each_part_is_told(
    detector: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="d2kd"):
        load_part(detector, tmp_path / "x.pth", lambda k: "bottom_up" in k)
    assert re.search(
        r"covers (\d+) of \d+ parameters of the model: .*backbone \1 of \1.*head 0 of \d+",
        caplog.text,
    )
    assert not [
        x for x in caplog.records if x.name == "d2kd.weights.coverage" and x.levelname != "INFO"
    ]


def test_backbone_of_another_depth_is_a_warning(
    detector: nn.Module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="d2kd"):
        load_part(detector, tmp_path / "x.pth", lambda k: "bottom_up" in k and ".res5." not in k)
        load_part(detector, tmp_path / "x.pth", lambda k: "bottom_up" in k and ".res4." not in k)
    assert len([x for x in caplog.records if "Of the backbone that is little" in x.message]) == 1


def test_three_entries_are_nothing_to_start_from(detector: nn.Module, tmp_path: Path) -> None:
    few = sorted(k for k, _ in detector.named_parameters())[:3]
    with pytest.raises(ValueError, match=r"x\.pth.* covers 3 of \d+ parameters.*from scratch"):
        load_part(detector, tmp_path / "x.pth", lambda k: k in few)


def test_both_shapes_are_named(detector: nn.Module, tmp_path: Path) -> None:
    state = {**other_weights(), "head.cls_score.bias": torch.zeros(7)}
    torch.save({"model": state}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"bias: \(7,\) in the file, \(9,\) in the detector"):
        load_whole_detector(detector, str(tmp_path / "x.pth"), "KEY")


# Resuming -----------------------------------------------------------------------------------------


def test_run_is_not_resumed_from_weights_alone(tmp_path: Path) -> None:
    cfg = run_config(tmp_path)
    trainer = build_trainer(cfg)
    state = trainer.model.state_dict()
    for content in ({"model": state, "iteration": 9}, {"meta": {}, "state_dict": state}):
        torch.save(content, Path(cfg.OUTPUT_DIR) / "model_0000009.pth")
        Path(cfg.OUTPUT_DIR, "last_checkpoint").write_text("model_0000009.pth")
        with pytest.raises(ValueError, match=r"model_0000009\.pth is no checkpoint to resume from"):
            trainer.resume_or_load(resume=True)


def test_file_of_another_tool_in_the_folder_of_a_run_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model_0000009.pth"
    torch.save({"args": argparse.Namespace(lr=1), "state_dict": {}}, path)
    (tmp_path / "last_checkpoint").write_text(path.name)
    with pytest.raises(ValueError, match="argparse.Namespace") as error:
        last_whole_checkpoint(str(tmp_path))
    assert "weights_only" not in str(error.value)
