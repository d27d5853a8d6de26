"""Runs with a teacher of other classes: the map in the log, resuming, stages, the doctor."""

import logging
import os
import re
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch

from detectron2.config import CfgNode

from d2kd import doctor, load_config
from d2kd.engine import Trainer, train
from d2kd.engine.stages import plan_stages
from d2kd.teacher import build_teacher
from tests.helpers.runs import assert_same_tensors, interrupt, run_config, scalars
from tests.helpers.toys import write_teacher

CLASSES = ["star", "dog", "Disc", "square"]
MAP = """Classes, student's <- teacher's:
  disc <- Disc
  ring, cross <- dog
  square <- square
  star <- star
  only in the student: triangle"""
ALIASES = """
      - [disc, Disc]
      - [ring, dog]
      - [cross, dog]"""


@pytest.fixture(scope="module")
def four(folder: Path) -> List[Any]:
    """DISTILL.TEACHER.* of a teacher of CLASSES, whose config names no data set."""
    os.makedirs(folder / "four")
    return write_teacher(folder / "four", "retinanet", MODEL__RETINANET__NUM_CLASSES=4)


@pytest.fixture
def cfg(folder: Path, four: List[Any], tmp_path: Path) -> CfgNode:
    """DIST and PKD, with CLASSES and ALIASES as a user writes them."""
    return config(folder, four, tmp_path)


def config(folder: Path, four: List[Any], output: Path, heads: str = "[DIST, PKD]") -> CfgNode:
    base = run_config(folder, four, ["PKD"], OUTPUT_DIR=str(output / "run"))
    (output / "base.yaml").write_text(base.dump())
    (output / "run.yaml").write_text(f"""
_BASE_: base.yaml
DISTILL:
  HEADS: {heads}
  TEACHER:
    CLASSES: [star, dog, Disc, square]
    ALIASES:{ALIASES}
""")
    return load_config(str(output / "run.yaml"))


def trained(cfg: CfgNode, resume: bool = False) -> Trainer:
    """d2kd.engine.train, and the Trainer it used."""
    trainers: List[Trainer] = []
    build_hooks = Trainer.build_hooks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "build_hooks", lambda x: trainers.append(x) or build_hooks(x))
        train(cfg, resume=resume)
    return trainers[-1]


def no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "train", lambda self: pytest.fail("it began to train"))


def test_map_is_logged_and_a_resumed_run_equals_an_uninterrupted_one(
    cfg: CfgNode, folder: Path, four: List[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="d2kd")
    whole = trained(cfg)
    assert MAP in caplog.text
    values = scalars(whole)
    for name in ("loss_dist_inter", "loss_dist_intra", "loss_pkd"):
        assert sorted(values[name]) == [0, 1, 2, 3] and values[name][3] > 0
    saved = torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)
    assert not any("merge" in k for k in [*saved["model"], *saved["distill_heads"]])

    (tmp_path / "again").mkdir()
    again = config(folder, four, tmp_path / "again")
    interrupt(again, 3)
    resumed = trained(again, resume=True)
    assert resumed.start_iter == 2
    assert_same_tensors(resumed._module.state_dict(), whole._module.state_dict())


def test_nothing_in_common_stops_before_the_first_step(
    cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_step(monkeypatch)
    cfg.DISTILL.TEACHER.merge_from_list(["CLASSES", ["a", "b", "c", "d"], "ALIASES", []])
    with pytest.raises(
        ValueError, match="student and teacher have no class in common:\n  only in the"
    ):
        train(cfg)
    assert not list(Path(cfg.OUTPUT_DIR).glob("model*"))


def test_nothing_in_common_goes_on_with_features_where_that_is_allowed(
    cfg: CfgNode, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="d2kd")
    opts = ["CLASSES", ["a", "b", "c", "d"], "ALIASES", [], "ALLOW_OTHER_CLASSES", True]
    cfg.DISTILL.TEACHER.merge_from_list(opts)
    cfg.DISTILL.HEADS = ["PKD"]
    assert sorted(scalars(trained(cfg))["loss_pkd"]) == [0, 1, 2, 3]
    assert "only in the teacher: a, b, c, d" in caplog.text
    no_step(monkeypatch)
    cfg.DISTILL.HEADS = ["DIST", "PKD"]
    reason = "DIST compares class logits, but the detectors have no class in common. Heads that fit"
    with pytest.raises(ValueError, match=f"DISTILL.HEADS: {reason}: .*PKD"):
        train(cfg)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("CLASSES", ["star"], "DISTILL.TEACHER.CLASSES must name each of the teacher's 4 classes"),
        (
            "ALIASES",
            [["disc", "dsic"]],
            r"entry \['disc', 'dsic'\], but the teacher .* Did you mean 'Disc'\?",
        ),
        ("CLASSES", [], r"DISTILL.TEACHER.ALIASES .* teacher's classes are unknown"),
    ],
)
def test_mistake_stops_before_the_first_step(
    key: str, value: Any, message: str, cfg: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_step(monkeypatch)
    cfg.DISTILL.TEACHER[key] = value
    with pytest.raises(ValueError, match=message):
        train(cfg)


# Stages ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(folder: Path) -> Dict[str, Any]:
    """TEACHER of a stage, of two classes."""
    os.makedirs(folder / "two")
    opts = write_teacher(folder / "two", "retinanet", seed=8, MODEL__RETINANET__NUM_CLASSES=2)
    return {"CONFIG_FILE": opts[1], "WEIGHTS": opts[3]}


@pytest.fixture
def staged(cfg: CfgNode, two: Dict[str, Any]) -> CfgNode:
    cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = (), 1
    teacher = {**two, "CLASSES": ["cross", "moon"], "ALIASES": [["disc", "moon"]]}
    cfg.DISTILL.STAGES = [{"ITERATIONS": 2}, {"ITERATIONS": 2, "TEACHER": teacher}]
    return cfg


def test_each_stage_has_the_classes_of_its_teacher(
    staged: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="d2kd")
    trainer = trained(staged)
    assert trainer.stage.index == 2 and sorted(scalars(trainer)["loss_dist_inter"]) == [2, 3]
    maps = re.findall(r"Classes, student's <- teacher's:\n((?:  .*\n?)*)", caplog.text)
    assert [x.strip() for x in maps] == [
        MAP.split("\n", 1)[1].strip(),
        "disc <- moon\n  cross <- cross\n  only in the student: ring, triangle, square, star",
    ]


def test_stage_whose_teacher_has_other_weights_alone_keeps_the_run_s_classes(
    staged: CfgNode, four: List[Any], two: Dict[str, Any]
) -> None:
    staged.DISTILL.STAGES[1]["TEACHER"] = {"WEIGHTS": four[3]}
    teachers = [x.cfg.DISTILL.TEACHER for x in plan_stages(staged)]
    assert teachers[0] == teachers[1] and teachers[1].CLASSES == CLASSES
    staged.DISTILL.STAGES[1]["TEACHER"] = dict(two)
    second = plan_stages(staged)[1].cfg.DISTILL.TEACHER
    assert second.CLASSES == second.ALIASES == []


def test_wrong_classes_of_a_later_stage_stop_before_the_first_step(
    staged: CfgNode, two: Dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    no_step(monkeypatch)
    # A teacher of its own has none of the run's CLASSES and ALIASES: here, no names at all.
    staged.DISTILL.STAGES[1]["TEACHER"] = dict(two)
    with pytest.raises(ValueError, match=r"STAGES\[1\]: .*DIST compares .* 6 classes .* teacher 2"):
        train(staged)
    staged.DISTILL.STAGES[1]["TEACHER"] = {**two, "CLASSES": ["moon", "sun"]}
    with pytest.raises(ValueError, match=r"STAGES\[1\]: DISTILL.TEACHER: .*no class in common"):
        train(staged)


# The doctor --------------------------------------------------------------------------------------


def test_doctor_prints_the_map(cfg: CfgNode, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert doctor.main(["--config-file", str(tmp_path / "run.yaml")]) == 0
    out = capsys.readouterr().out
    assert MAP in out and re.search(r"^DIST +used", out, re.MULTILINE)
    opts = ["DISTILL.TEACHER.ALIASES", "[]", "DISTILL.TEACHER.CLASSES", "['a', 'b', 'Cross', 'c']"]
    assert doctor.main(["--config-file", str(tmp_path / "run.yaml"), *opts]) == 2
    text = capsys.readouterr().err
    assert "no class in common" in text
    assert "similar names, possibly DISTILL.TEACHER.ALIASES: [['cross', 'Cross']]" in text


def test_doctor_says_that_names_are_not_known(
    cfg: CfgNode, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    opts = ["DISTILL.TEACHER.ALIASES", "[]", "DISTILL.TEACHER.CLASSES", "[]"]
    opts += ["DISTILL.HEADS", "['PKD']"]
    assert doctor.main(["--config-file", str(tmp_path / "run.yaml"), *opts]) == 0
    said = "  their names are not known of both, and there are 6 and 4: logits cannot be compared"
    assert said in capsys.readouterr().out


def test_classes_that_are_matched_otherwise_are_another_teacher(cfg: CfgNode) -> None:
    interrupt(cfg, 3)
    cfg.DISTILL.TEACHER.ALIASES = [["disc", "Disc"], ["ring", "dog"]]
    with pytest.raises(ValueError, match="another teacher: classes differs"):
        train(cfg, resume=True)


def test_teacher_whose_class_names_are_not_there_is_said(
    folder: Path, four: List[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = run_config(folder, four, ["PKD"])
    own = load_config(cfg.DISTILL.TEACHER.CONFIG_FILE)
    own.DATASETS.COCO_FORMAT = [{"NAME": "of_it", "JSON": "gone.json", "IMAGES": "gone"}]
    own.DATASETS.TRAIN = ("of_it",)
    (tmp_path / "teacher.yaml").write_text(own.dump())
    cfg.DISTILL.TEACHER.CONFIG_FILE = str(tmp_path / "teacher.yaml")
    build_teacher(cfg)
    assert "names its classes in 'gone.json', which is not there" in caplog.text
