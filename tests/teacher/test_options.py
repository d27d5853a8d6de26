"""Options of a teacher come from YAML, and wrong ones are refused by key and value."""

from typing import Any, List

import pytest
import torch

from d2kd.engine.preflight.check_config import check_config
from d2kd.teacher import TeacherOptions
from tests.helpers.toys import distill_config, write_teacher


@pytest.fixture(scope="module")
def retinanet(tmp_path_factory: pytest.TempPathFactory) -> List[Any]:
    return write_teacher(tmp_path_factory.mktemp("teacher"), "retinanet")


def test_all_are_off_by_default(retinanet: List[Any]) -> None:
    options = TeacherOptions.from_config(distill_config("retinanet", retinanet))
    assert options == TeacherOptions() and not options.steps


def test_options_come_from_the_config_in_the_order_in_which_they_are_applied(
    retinanet: List[Any],
) -> None:
    cfg = distill_config("retinanet", retinanet)
    cfg.DISTILL.TEACHER.update(PRECISION="bfloat16", FOLD_NORMS=True, DEVICE="cpu")
    options = TeacherOptions.from_config(cfg)
    assert options == TeacherOptions(fold_norms=True, precision="bfloat16", device="cpu")
    assert options.steps == ("fold_norms", "precision")
    assert options.key("precision") == "DISTILL.TEACHER.PRECISION 'bfloat16'"


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("PRECISION", "half", "PRECISION must be one of , float32, bfloat16, float16, got 'half'"),
        ("DEVICE", "gpu", "DEVICE is 'gpu'; it must be 'cpu', 'cuda'"),
        ("DEVICE", "cuda:x", "DEVICE is 'cuda:x'; it must be"),
        ("DEVICE", "cuda:1", "DEVICE is 'cuda:1', but PyTorch sees 1 GPUs"),
    ],
)
def test_wrong_value_is_refused(
    key: str, value: str, message: str, retinanet: List[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    cfg = distill_config("retinanet", retinanet)
    cfg.DISTILL.TEACHER[key] = value
    with pytest.raises(ValueError, match=f"DISTILL.TEACHER.{message}"):
        check_config(cfg)


def test_gpu_is_refused_where_there_is_none(
    retinanet: List[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    cfg = distill_config("retinanet", retinanet)
    cfg.DISTILL.TEACHER.DEVICE = "cuda"
    with pytest.raises(ValueError, match="DEVICE is 'cuda', but PyTorch sees 0 GPUs"):
        TeacherOptions.from_config(cfg)


def test_one_gpu_cannot_have_the_teachers_of_all_processes(
    retinanet: List[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    cfg = distill_config("retinanet", retinanet)
    cfg.DISTILL.TEACHER.DEVICE = "cuda:1"
    assert TeacherOptions.from_config(cfg).device == "cuda:1"
    monkeypatch.setattr("d2kd.teacher.options.comm.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match="DEVICE is 'cuda:1', on which all 2 processes"):
        TeacherOptions.from_config(cfg)
