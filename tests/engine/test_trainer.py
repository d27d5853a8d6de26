"""Runs of a few iterations: resuming, the same batches for all, non-finite losses, schedules."""

import os
from pathlib import Path
from typing import Any, Dict, List

import pytest
import torch

from detectron2.config import CfgNode
from detectron2.engine import HookBase

from d2kd import student_config
from d2kd.engine import Trainer, train
from tests.helpers.runs import (
    Interrupt,
    Interruption,
    RecordBatches,
    assert_same_tensors,
    interrupt,
    run,
    run_config,
    scalars,
    snapshot,
)
from tests.helpers.toys import write_teacher


def at(cfg: CfgNode, folder: Path, name: str) -> CfgNode:
    """The same run with another OUTPUT_DIR."""
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = str(folder / name)
    return cfg


def final(cfg: CfgNode) -> Dict[str, Any]:
    return torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)


def assert_same_end(actual: Dict[str, Any], expected: Dict[str, Any]) -> None:
    """Student, heads, momentum and learning rates of two final checkpoints agree bit for bit."""
    assert_same_tensors(actual["model"], expected["model"])
    if "distill_heads" in expected:
        assert_same_tensors(actual["distill_heads"], expected["distill_heads"])
    ours, theirs = (x["trainer"]["_trainer"]["optimizer"] for x in (actual, expected))
    assert ours["param_groups"] == theirs["param_groups"]
    for i, state in theirs["state"].items():
        assert torch.equal(ours["state"][i]["momentum_buffer"], state["momentum_buffer"])


# Resuming ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("student", ["retinanet", "faster_rcnn"])
def test_interrupted_and_resumed_run_equals_an_uninterrupted_one(
    student: str, folder: Path, teacher: List[Any], tmp_path: Path
) -> None:
    # Warm-up until 2, a step at 3, saved after iterations 1 and 3, stopped in 4, resumed at 4.
    cfg = run_config(folder, teacher, ["MGD", "PKD"], student, SOLVER__MAX_ITER=6)
    cfg.DISTILL.MGD.SCHEDULE.WARMUP_ITERS = 3
    cfg.DISTILL.PKD.SCHEDULE.DECAY = "cosine"
    whole, parts = at(cfg, tmp_path, "whole"), at(cfg, tmp_path, "parts")
    expected = scalars(run(whole))
    interrupt(parts, 4)
    resumed = scalars(run(parts, resume=True))
    assert {"total_loss", "loss_mgd", "loss_pkd", "MGD/weight", "lr"} <= set(expected)
    for name, values in expected.items():
        assert resumed[name] == {i: v for i, v in values.items() if i >= 4}, name
    assert_same_end(final(parts), final(whole))


def test_run_without_a_seed_resumes_with_the_one_it_was_begun_with(
    folder: Path, teacher: List[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = at(run_config(folder, teacher, SEED=-1), tmp_path, "parts")
    with monkeypatch.context() as patch:
        build_hooks = Trainer.build_hooks
        patch.setattr(Trainer, "build_hooks", lambda self: [*build_hooks(self), Interrupt(2)])
        with pytest.raises(Interruption):
            train(cfg)
    train(cfg, resume=True)
    seed = final(cfg)["trainer"]["seed"]
    whole = at(cfg, tmp_path, "whole")
    whole.SEED = seed
    run(whole)
    assert_same_end(final(cfg), final(whole))
    another = at(cfg, tmp_path, "another")
    train(another)
    assert final(another)["trainer"]["seed"] != seed


class Draws(HookBase):
    """What the student starts from, and a number that each iteration draws."""

    def __init__(self) -> None:
        self.numbers: List[float] = []

    def before_train(self) -> None:
        self.weights = snapshot(self.trainer.model)

    def before_step(self) -> None:
        self.numbers.append(float(torch.rand(())))


def test_seed_decides_on_the_first_weights_the_images_and_all_that_is_drawn(
    folder: Path, tmp_path: Path
) -> None:
    """Or seeds would tell nothing of the spread over seeds."""
    found = []
    for name, seed in (("one", 1), ("two", 2), ("two again", 2)):
        draws, recorder = Draws(), RecordBatches()
        run(at(run_config(folder, SEED=seed), tmp_path, name), recorder, draws)
        files = [x["file_name"] for batch in recorder.batches for x in batch]
        found.append((draws.weights["head.cls_subnet.0.weight"].tolist(), files, draws.numbers))
    one, two, again = found
    assert two == again and all(x != y for x, y in zip(one, two))


def test_resume_without_a_checkpoint_starts_at_the_beginning(folder: Path, tmp_path: Path) -> None:
    cfg = at(run_config(folder, SOLVER__MAX_ITER=2), tmp_path, "new")
    assert set(scalars(run(cfg, resume=True))["total_loss"]) == {0, 1}


def test_student_that_is_trained_already_is_told_that_its_channels_are_others(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The student's own file, and a teacher with as many channels.
    teacher = write_teacher(tmp_path, "retinanet")
    trained = teacher[teacher.index("DISTILL.TEACHER.WEIGHTS") + 1]
    for weights in ("", trained):
        values = {"MODEL__WEIGHTS": weights, "SOLVER__MAX_ITER": 1}
        run(at(run_config(folder, teacher, ["PKD"], **values), tmp_path, f"run_{bool(weights)}"))
        assert ("channel i PKD will compare" in caplog.text) == bool(weights)


# The student alone -------------------------------------------------------------------------------


def test_disabled_run_equals_the_plain_student_and_sees_the_batches_of_a_distilled_run(
    folder: Path, teacher: List[Any], tmp_path: Path
) -> None:
    distilled = at(run_config(folder, teacher, ["MGD", "PKD"]), tmp_path, "distilled")
    disabled = at(distilled, tmp_path, "disabled")
    disabled.DISTILL.ENABLED = False
    plain = at(student_config(distilled), tmp_path, "plain")
    seen, losses = {}, {}
    for name, cfg in (("plain", plain), ("disabled", disabled), ("distilled", distilled)):
        recorder = RecordBatches()
        losses[name] = scalars(run(cfg, recorder))
        seen[name] = recorder.batches
    assert losses["disabled"] == losses["plain"]
    assert_same_end(final(disabled), final(plain))
    # The first iteration's own losses too: nothing that d2kd does moves the student before.
    for key in ("loss_cls", "loss_box_reg"):
        assert losses["distilled"][key][0] == losses["plain"][key][0]
        assert losses["distilled"][key][3] != losses["plain"][key][3]
    for name in ("disabled", "distilled"):
        assert len(seen[name]) == len(seen["plain"]) == 4
        for batch, expected in zip(seen[name], seen["plain"]):
            assert [x["file_name"] for x in batch] == [x["file_name"] for x in expected]
            assert all(torch.equal(x["image"], y["image"]) for x, y in zip(batch, expected))


def test_plain_run_is_that_of_stock_detectron2_s_forward(folder: Path, tmp_path: Path) -> None:
    """A plain student is not wrapped, hooked or given other keys."""
    cfg = at(run_config(folder, SOLVER__MAX_ITER=1), tmp_path, "plain")
    trainer = run(cfg)
    assert type(trainer.model).__module__.startswith("detectron2.")
    assert set(final(cfg)) == {"model", "trainer", "iteration"}


# When something is wrong -------------------------------------------------------------------------


class Poison(HookBase):
    """Makes one parameter NaN before an iteration."""

    def __init__(self, iteration: int, name: str):
        self.iteration = iteration
        self.name = name

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            with torch.no_grad():
                self.trainer.model.get_parameter(self.name).fill_(float("nan"))


def test_non_finite_loss_names_term_level_and_images_and_leaves_the_checkpoints(
    folder: Path, teacher: List[Any], tmp_path: Path
) -> None:
    cfg = at(run_config(folder, teacher, ["MGD", "PKD"]), tmp_path, "nan")
    recorder, before = RecordBatches(), {}

    class Remember(HookBase):
        def before_step(self) -> None:
            if self.trainer.iter == 3:
                before.update(files_of(cfg))

    poison = Poison(3, "heads.MGD.generator.p4.2.bias")
    with pytest.raises(FloatingPointError) as info:
        run(cfg, recorder, Remember(), poison)
    message = str(info.value)
    assert "loss_mgd = nan" in message and "loss_pkd = nan" not in message
    assert "loss_mgd is not finite at level p4\n" in message
    for x in recorder.batches[-1]:
        assert x["file_name"] in message
    assert len(recorder.batches) == 4 and "model_0000001.pth" in before
    assert files_of(cfg) == before
    assert all(
        x.isfinite().all() for x in torch.load(tmp_path / "nan/model_0000001.pth")["model"].values()
    )


def test_non_finite_features_of_the_student_are_named_by_level(
    folder: Path, teacher: List[Any], tmp_path: Path
) -> None:
    cfg = at(run_config(folder, teacher), tmp_path, "nan")
    with pytest.raises(FloatingPointError, match="(?s)student's features at p5 have"):
        run(cfg, Poison(1, "student.backbone.fpn_output5.weight"))


def test_non_finite_loss_of_a_plain_student_is_explained_too(folder: Path, tmp_path: Path) -> None:
    cfg = at(run_config(folder), tmp_path, "nan")
    with pytest.raises(FloatingPointError, match="(?s)loss_cls = nan.*d2kd_shapes"):
        run(cfg, Poison(1, "head.cls_score.bias"))


def files_of(cfg: CfgNode) -> Dict[str, bytes]:
    names = [x for x in os.listdir(cfg.OUTPUT_DIR) if x.endswith(".pth") or x == "last_checkpoint"]
    return {x: (Path(cfg.OUTPUT_DIR) / x).read_bytes() for x in names}


# Schedules ---------------------------------------------------------------------------------------


def test_after_its_stop_a_term_is_zero_and_the_teacher_is_not_run(
    folder: Path, teacher: List[Any], tmp_path: Path
) -> None:
    cfg = at(run_config(folder, teacher), tmp_path, "stop")
    cfg.DISTILL.MGD.SCHEDULE.STOP_ITER = 2
    calls = []

    class CountTeacher(HookBase):
        def before_train(self) -> None:
            backbone = self.trainer.model.teacher.model.backbone
            backbone.register_forward_hook(lambda *_: calls.append(self.trainer.iter))

    losses = scalars(run(cfg, CountTeacher()))
    assert [losses["loss_mgd"][i] > 0 for i in range(4)] == [True, True, False, False]
    assert losses["loss_mgd"][2] == losses["loss_mgd"][3] == losses["MGD/weight"][3] == 0
    assert calls == [0, 1]


# Before the first step ---------------------------------------------------------------------------

# (key, wrong value, what the message must have beside the key)
WRONG = [
    ("SOLVER.AMP.ENABLED", True, "cpu"),
    ("SOLVER.IMS_PER_BATCH", 0, "got 0"),
    ("SOLVER.LR_SCHEDULER_NAME", "Cosine", "Cosine"),
    ("SOLVER.WARMUP_METHOD", "square", "square"),
    ("TEST.AUG.ENABLED", True, "True"),
    ("MODEL.WEIGHTS", "nowhere.pth", "nowhere.pth"),
    ("MODEL.RETINANET.NUM_CLASSES", 77, "77"),
    ("DATASETS.TRAIN", ("d2kd_shapes_trian",), "d2kd_shapes_train"),
    ("DISTILL.STUDENT_META_ARCHITECTURE", "RetinaNot", "RetinaNet"),
    ("DISTILL.HEADS", ["MGDD"], "'MGD'"),
    ("DISTILL.HEADS", [], "empty"),
    ("DISTILL.LEVELS", [["p9", "p3"]], "'p9'"),
    ("DISTILL.INHERIT", ["tail"], "'tail'"),
    ("DISTILL.TEACHER.CONFIG_FILE", "", "empty"),
    ("DISTILL.TEACHER.CONFIG_FILE", "nowhere.yaml", "nowhere.yaml"),
    ("DISTILL.TEACHER.WEIGHTS", "", "empty"),
    ("DISTILL.TEACHER.WEIGHTS", "nowhere.pth", "nowhere.pth"),
    ("DISTILL.TEACHER.OPTS", ["MODEL.RETINANET.NUM_CLASS", 8], "NUM_CLASSES"),
    ("DISTILL.MGD.LOSS_WEIGHT", 0.0, "0.0"),
    ("DISTILL.MGD.MASK_RATIO", 1.0, "1.0"),
    ("DISTILL.MGD.SCHEDULE.STOP_ITER", 0, "positive"),
]


@pytest.mark.parametrize("key, value, hint", WRONG, ids=[f"{k}={v}" for k, v, _ in WRONG])
def test_mistake_is_named_before_the_first_step(
    key: str,
    value: Any,
    hint: str,
    folder: Path,
    teacher: List[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = at(run_config(folder, teacher), tmp_path, "wrong")
    cfg.merge_from_list([key, value])
    monkeypatch.setattr(Trainer, "train", lambda self: pytest.fail("it began to train"))
    with pytest.raises((ValueError, FileNotFoundError)) as info:
        train(cfg)
    assert key in str(info.value) and hint in str(info.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_that_is_not_there_is_named_before_the_first_step(folder: Path) -> None:
    with pytest.raises(ValueError, match="MODEL.DEVICE is 'cuda'"):
        train(run_config(folder, MODEL__DEVICE="cuda"))
