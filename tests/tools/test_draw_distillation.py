"""Pictures of a checkpoint."""

from pathlib import Path
from types import ModuleType
from typing import Any, Callable, List

import cv2
import pytest
import torch

from runs import run, run_config


@pytest.fixture
def draw(tool: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    module = tool("draw_distillation")
    # It would keep d2kd's log from caplog, in the tests of other files too.
    monkeypatch.setattr(module, "setup_logger", lambda **_: None)
    return module.main


@pytest.fixture(scope="module")
def finished(folder: Path, teacher: List[Any]) -> Path:
    """OUTPUT_DIR of a toy run; its YAML is config.yaml."""
    cfg = run_config(folder, teacher, DATASETS__TEST=("d2kd_shapes_val",))
    run(cfg)
    (folder / "run" / "config.yaml").write_text(cfg.dump())
    return folder / "run"


@pytest.fixture
def words(finished: Path, tmp_path: Path) -> List[str]:
    arguments = {
        "--config-file": finished / "config.yaml",
        "--weights": finished / "model_final.pth",
        "--output": tmp_path / "pictures",
    }
    return [str(word) for pair in arguments.items() for word in pair]


def test_each_image_gets_a_picture_of_its_name(
    draw: Callable[..., None], words: List[str], tmp_path: Path
) -> None:
    draw([*words, "--images", "3"])
    files = sorted((tmp_path / "pictures").iterdir())
    assert [x.name for x in files] == ["000000.png", "000001.png", "000002.png"]
    pictures = [cv2.imread(str(x)) for x in files]
    assert len({x.shape for x in pictures}) == 1
    assert not (pictures[0] == pictures[1]).all()


def test_a_second_call_draws_the_same(
    draw: Callable[..., None], words: List[str], tmp_path: Path
) -> None:
    contents = []
    for _ in range(2):
        draw([*words, "--images", "1"])
        contents.append((tmp_path / "pictures" / "000000.png").read_bytes())
        torch.rand(3)
    assert contents[0] == contents[1]


def test_a_head_that_has_stopped_is_drawn_too(
    draw: Callable[..., None], words: List[str], tmp_path: Path
) -> None:
    heights = []
    for stop in ("-1", "1"):
        draw([*words, "--images", "1", "DISTILL.MGD.SCHEDULE.STOP_ITER", stop])
        heights.append(cv2.imread(str(tmp_path / "pictures" / "000000.png")).shape)
    assert heights[0] == heights[1]


def test_a_plain_student_is_drawn_with_a_warning(
    draw: Callable[..., None],
    words: List[str],
    finished: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = torch.load(finished / "model_final.pth", weights_only=True)["model"]
    torch.save({"model": model}, tmp_path / "plain.pth")
    draw([*words, "--images", "1", "--weights", str(tmp_path / "plain.pth")])
    assert "untrained" in caplog.text
    assert (tmp_path / "pictures" / "000000.png").exists()


def test_heads_of_another_run_are_refused(draw: Callable[..., None], words: List[str]) -> None:
    with pytest.raises(ValueError, match="other heads"):
        draw([*words, "DISTILL.HEADS", "['PKD']"])


def test_another_student_is_refused(draw: Callable[..., None], words: List[str]) -> None:
    with pytest.raises(ValueError, match="another student"):
        draw([*words, "MODEL.RETINANET.NUM_CONVS", "2"])


def test_a_run_without_teacher_has_no_picture(draw: Callable[..., None], words: List[str]) -> None:
    with pytest.raises(ValueError, match="no teacher to draw"):
        draw([*words, "DISTILL.ENABLED", "False"])


def test_help_teaches_an_example(
    draw: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        draw(["--help"])
    text = capsys.readouterr().out
    for word in ("--weights", "VIS_PERIOD", "configs/quickstart/mgd.yaml", "How to read"):
        assert word in text, word
