"""DISTILL.STAGES: the plan, what is carried over, resuming anywhere, two processes."""

import json
import logging
import os
import shutil
import weakref
from pathlib import Path
from typing import Any, Dict, List, Optional
from unittest import mock

import pytest
import torch

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.solver import build_lr_scheduler
from detectron2.utils import comm

from d2kd.config import student_config
from d2kd.engine import Trainer, train
from d2kd.engine.facts import read_facts
from d2kd.engine.metrics import Metrics
from d2kd.engine.preflight.check_config import check_config
from d2kd.engine.stages import plan_stages
from tests.helpers.forks import launch_two
from tests.helpers.runs import (
    Interrupt,
    Interruption,
    assert_same_checkpoint,
    assert_same_tensors,
    run_config,
    saved,
    scalars,
    snapshot,
)
from tests.helpers.toys import write_teacher


@pytest.fixture(scope="module")
def stronger(folder: Path) -> Dict[str, str]:
    """A second teacher, as the TEACHER of a stage: the first one's config, other weights."""
    os.makedirs(folder / "stronger")
    opts = write_teacher(folder / "stronger", "retinanet", seed=8, MODEL__FPN__OUT_CHANNELS=64)
    return {"CONFIG_FILE": opts[1], "WEIGHTS": opts[3]}


@pytest.fixture
def staged(folder: Path, teacher: List[Any], stronger: Dict[str, str], tmp_path: Path) -> CfgNode:
    return staged_config(folder, teacher, stronger, tmp_path)


def staged_config(
    folder: Path, teacher: List[Any], stronger: Dict[str, str], output: Path
) -> CfgNode:
    """3 + 3 iterations: MGD with one teacher, then MGD and PKD with another; saved every 2."""
    cfg = run_config(folder, teacher, OUTPUT_DIR=str(output), SOLVER__MAX_ITER=6)
    cfg.SOLVER.STEPS = (4,)
    cfg.DISTILL.MGD.SCHEDULE.WARMUP_ITERS = 2
    cfg.DISTILL.STAGES = [
        {"ITERATIONS": 3},
        {"ITERATIONS": 3, "TEACHER": dict(stronger), "HEADS": ["MGD", "PKD"]},
    ]
    return cfg


class Recorder(HookBase):
    """Weights and the losses' running mean at both ends of each stage."""

    def __init__(self) -> None:
        self.start: List[Dict[str, torch.Tensor]] = []
        self.end: List[Dict[str, torch.Tensor]] = []
        self.means: List[Optional[float]] = []  # None: not begun yet

    def before_train(self) -> None:
        self.start.append(snapshot(self.trainer._module))
        self.means.append(getattr(self.trainer._module.student, "loss_normalizer", None))

    def after_train(self) -> None:
        self.end.append(snapshot(self.trainer._module))
        self.means.append(getattr(self.trainer._module.student, "loss_normalizer", None))


def train_stages(cfg: CfgNode, *hooks: HookBase, resume: bool = False) -> List[Trainer]:
    """d2kd.engine.train with more hooks, before all others; the trainers of its stages."""
    trainers: List[Trainer] = []
    build_hooks = Trainer.build_hooks

    def with_hooks(self: Trainer) -> List[Any]:
        trainers.append(self)
        return [*hooks, *build_hooks(self)]

    with mock.patch.object(Trainer, "build_hooks", with_hooks):
        try:
            train(cfg, resume=resume)
        except Interruption:
            pass
    return trainers


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> List[str]:
    """The weights of the teachers that a run evaluates, one after the other."""
    weights: List[str] = []
    monkeypatch.setattr(
        "d2kd.engine.preflight.teacher_check.check_teacher",
        lambda cfg, *_: weights.append(cfg.DISTILL.TEACHER.WEIGHTS),
    )
    return weights


def all_scalars(trainers: List[Trainer]) -> Dict[str, Dict[int, float]]:
    merged: Dict[str, Dict[int, float]] = {}
    for trainer in trainers:
        for key, values in scalars(trainer).items():
            merged.setdefault(key, {}).update(values)
    return merged


@pytest.fixture(scope="module")
def whole(
    folder: Path, teacher: List[Any], stronger: Dict[str, str], tmp_path_factory: Any
) -> Dict[str, Any]:
    """An uninterrupted run."""
    cfg = staged_config(folder, teacher, stronger, tmp_path_factory.mktemp("whole"))
    recorder = Recorder()
    trainers = train_stages(cfg, recorder)
    return {"cfg": cfg, "recorder": recorder, "scalars": all_scalars(trainers)}


# The plan ----------------------------------------------------------------------------------------


def test_stages_take_from_the_run_what_they_do_not_name(
    staged: CfgNode, stronger: Dict[str, str]
) -> None:
    staged.DISTILL.INHERIT = ["neck"]
    staged.DISTILL.TEACHER.OPTS = ["MODEL.FPN.OUT_CHANNELS", 64]
    staged.TEST.EXPECTED_RESULTS = [["bbox", "AP", 38.5, 0.2]]
    first, second = plan_stages(staged)
    assert (first.start, first.end, second.start, second.end) == (0, 3, 3, 6)
    assert first.cfg.DISTILL.TEACHER == staged.DISTILL.TEACHER
    assert first.cfg.DISTILL.HEADS == ["MGD"] and first.cfg.DISTILL.INHERIT == ["neck"]
    assert second.cfg.DISTILL.TEACHER.WEIGHTS == stronger["WEIGHTS"]
    assert second.cfg.DISTILL.TEACHER.OPTS == [], "they are the first teacher's"
    assert second.cfg.DISTILL.HEADS == ["MGD", "PKD"] and second.cfg.DISTILL.INHERIT == []
    assert not first.cfg.TEST.EXPECTED_RESULTS and second.cfg.TEST.EXPECTED_RESULTS
    assert str(second) == (
        f"Stage 2 of 2: iterations 3 to 5, teacher {stronger['CONFIG_FILE']}, "
        "heads ['MGD', 'PKD']"
    )


def test_config_file_alone_is_another_teacher_without_the_weights_of_the_run(
    staged: CfgNode,
) -> None:
    zoo = "COCO-Detection/retinanet_R_101_FPN_3x.yaml"
    staged.DISTILL.STAGES[1]["TEACHER"] = {"CONFIG_FILE": zoo}
    second = plan_stages(staged)[1].cfg.DISTILL.TEACHER
    assert (second.CONFIG_FILE, second.WEIGHTS) == (zoo, "")


def test_restarted_2x_schedule_is_the_1x_schedule_in_each_half(staged: CfgNode) -> None:
    staged.merge_from_list(["SOLVER.MAX_ITER", 180000, "SOLVER.STEPS", (120000, 160000)])
    for stage in staged.DISTILL.STAGES:
        stage["ITERATIONS"] = 90000
    staged.DISTILL.STAGES[1]["OPTS"] = ["SOLVER.STEPS", [80000], "DISTILL.MGD.MASK_RATIO", 0.25]
    first, second = (x.cfg for x in plan_stages(staged))
    assert first.SOLVER.MAX_ITER == second.SOLVER.MAX_ITER == 90000
    assert first.SOLVER.STEPS == (60000, 80000) and second.SOLVER.STEPS == (80000,)
    assert (first.DISTILL.MGD.MASK_RATIO, second.DISTILL.MGD.MASK_RATIO) == (0.65, 0.25)


def test_run_without_stages_and_student_alone_are_one_stage(staged: CfgNode) -> None:
    staged.DISTILL.STAGES[0]["ITERATIONS"] = 99  # nobody looks
    staged.DISTILL.ENABLED = False
    plain = student_config(staged)
    for cfg in (staged, plain):
        check_config(cfg)
        (only,) = plan_stages(cfg)
        assert only.cfg is cfg and (only.start, only.end) == (0, 6)
        assert only.file_prefix == "model"


def test_stages_from_the_command_line_are_those_of_a_yaml(staged: CfgNode) -> None:
    stages = staged.DISTILL.STAGES
    staged.DISTILL.STAGES = []
    staged.merge_from_list(["DISTILL.STAGES", str(stages)])
    assert staged.DISTILL.STAGES == stages
    reread = CfgNode(CfgNode.load_cfg(staged.dump()))
    assert [x.end for x in plan_stages(reread)] == [3, 6]


MISTAKES = [
    ({"ITERATIONS": 2}, r"DISTILL.STAGES: ITERATIONS \[3, 2\] add up to 5, .* is 6"),
    ({"ITERATIONS": 0}, r"STAGES\[1\]: ITERATIONS must be 1 or more, got 0"),
    ({"ITERATIONS": None}, r"STAGES\[1\]: The entry: ITERATIONS is None"),
    ({"ITERATIONS": 3.0}, r"STAGES\[1\]: .*float.*ITERATIONS"),
    ({"HEAD": ["PKD"]}, r"STAGES\[1\]: (.|\n)*HEAD \(did you mean HEADS\?\)"),
    ({"HEADS": "PKD"}, r"STAGES\[1\]: .*str.*HEADS"),
    ({"HEADS": []}, r"STAGES\[1\]: DISTILL.HEADS is empty"),
    ({"INHERIT": ["tail"]}, r"STAGES\[1\]: DISTILL.INHERIT has 'tail'"),
    ({"TEACHER": {"WEIGHT": ""}}, r"TEACHER.WEIGHT \(did you mean TEACHER.WEIGHTS\?\)"),
    ({"TEACHER": {"WEIGHTS": "no.pth"}}, r"STAGES\[1\]: DISTILL.TEACHER.WEIGHTS: .*'no.pth'"),
    ({"TEACHER": None}, r"STAGES\[1\]: The entry: TEACHER must be a mapping"),
    ({"OPTS": ["DISTILL.MGDD.LOSS_WEIGHT", 1]}, r"STAGES\[1\]: OPTS (.|\n)*did you mean DISTILL"),
    ({"OPTS": ["SOLVER.IMS_PER_BATCH", 4]}, r"STAGES\[1\]: OPTS has SOLVER.IMS_PER_BATCH"),
    ({"OPTS": ["SOLVER.MAX_ITER", 4]}, r"STAGES\[1\]: OPTS has SOLVER.MAX_ITER"),
    ({"OPTS": ["DISTILL.STAGES", []]}, r"STAGES\[1\]: OPTS has DISTILL.STAGES"),
    ({"OPTS": ["SOLVER.WARMUP_ITERS", 4]}, r"STAGES\[1\]: SOLVER.WARMUP_ITERS 4 is more than"),
    (
        {"OPTS": ["DISTILL.MGD.SCHEDULE.DECAY", "linear", "DISTILL.MGD.SCHEDULE.DECAY_FROM", 4]},
        r"STAGES\[1\]: DISTILL.MGD.SCHEDULE.DECAY_FROM must be in \[0, 3\], got 4: SOLVER.MAX_ITER",
    ),
]


@pytest.mark.parametrize("values, message", MISTAKES, ids=[str(v) for v, _ in MISTAKES])
def test_mistake_in_a_stage_is_named_with_the_stage(
    values: Dict[str, Any], message: str, staged: CfgNode
) -> None:
    staged.DISTILL.STAGES[1].update(values)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_config(staged)


RUN_MISTAKES = [
    ({"DISTILL.STAGES": ["MGD"]}, r"STAGES\[0\]: must be a mapping .*, got 'MGD'"),
    ({"DISTILL.STAGE_LR": "again"}, "STAGE_LR must be one of restart, continue, got 'again'"),
    ({"SOLVER.REFERENCE_WORLD_SIZE": 8}, "REFERENCE_WORLD_SIZE is 8"),
    ({"SOLVER.STEPS": (1, 4)}, r"STAGES\[0\]: SOLVER.STEPS \(1, 4\) of 6 .* become \(0, 2\) of 3"),
]


@pytest.mark.parametrize("values, message", RUN_MISTAKES, ids=[m for _, m in RUN_MISTAKES])
def test_mistake_of_the_run_is_named(values: Dict[str, Any], message: str, staged: CfgNode) -> None:
    staged.merge_from_list([word for pair in values.items() for word in pair])
    with pytest.raises(ValueError, match=message):
        check_config(staged)


def test_what_just_fits_into_a_stage_is_taken(staged: CfgNode) -> None:
    # As many processes as the config is for, a step at the run's end, a warm-up as long as a stage.
    staged.merge_from_list(["SOLVER.REFERENCE_WORLD_SIZE", 1, "SOLVER.STEPS", (2, 6)])
    staged.DISTILL.STAGES[1]["OPTS"] = ["SOLVER.WARMUP_ITERS", 3]
    first, second = plan_stages(staged)
    assert first.cfg.SOLVER.STEPS == second.cfg.SOLVER.STEPS == (1,)
    assert second.cfg.SOLVER.WARMUP_ITERS == 3


def test_learning_rate_of_a_stage_is_refused_where_the_run_has_one_schedule(
    staged: CfgNode,
) -> None:
    staged.DISTILL.STAGES[1]["OPTS"] = ["SOLVER.BASE_LR", 0.1]
    check_config(staged)
    staged.DISTILL.STAGE_LR = "continue"
    with pytest.raises(
        ValueError, match='OPTS has SOLVER.BASE_LR, but DISTILL.STAGE_LR "continue"'
    ):
        check_config(staged)


def test_later_stage_that_cannot_be_built_is_found_before_the_first_step(
    staged: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged.DISTILL.STAGES[1]["TEACHER"]["OPTS"] = ["MODEL.FPN.OUT_CHANNELS", 32]
    monkeypatch.setattr(Trainer, "train", lambda self: pytest.fail("it began to train"))
    with pytest.raises(ValueError, match=r"(?s)STAGES\[1\]: DISTILL.TEACHER.WEIGHTS.*covers"):
        train(staged)


def test_teacher_of_a_later_stage_that_knows_nothing_is_refused_before_the_first_step(
    staged: CfgNode, tmp_path: Path
) -> None:
    # The first one has 3 classes, for data of 6: it cannot be asked.
    (tmp_path / "six").mkdir()
    values = {"MODEL__FPN__OUT_CHANNELS": 64, "MODEL__RETINANET__NUM_CLASSES": 6}
    six = write_teacher(tmp_path / "six", "retinanet", **values)
    staged.DISTILL.STAGES[1]["TEACHER"] = {"CONFIG_FILE": six[1], "WEIGHTS": six[3]}
    staged.DATASETS.TEST = ("d2kd_shapes_val",)
    staged.DISTILL.TEACHER.EVAL_IMAGES = 4
    with pytest.raises(ValueError, match=r"STAGES\[1\]: DISTILL.TEACHER: on 4 .* has 0.00 AP"):
        train(staged)
    assert not list(tmp_path.glob("*.pth"))


def test_teacher_is_evaluated_until_its_stage_has_begun(
    staged: CfgNode, evaluated: List[str], stronger: Dict[str, str]
) -> None:
    train_stages(staged, Interrupt(2))
    assert sorted(evaluated) == sorted([staged.DISTILL.TEACHER.WEIGHTS, stronger["WEIGHTS"]])
    # From a checkpoint of the first stage, from its end, and from one of the second.
    for dies_in, again in ((3, [stronger["WEIGHTS"]]), (5, [stronger["WEIGHTS"]]), (5, [])):
        evaluated.clear()
        train_stages(staged, Interrupt(dies_in), resume=True)
        assert evaluated == again, dies_in


def test_teachers_are_told_apart_before_training_and_their_pictures_kept(
    staged: CfgNode,
    stronger: Dict[str, str],
    folder: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Teachers of the data's 6 classes, which random weights detect with some score each.
    values = {"MODEL__RETINANET__NUM_CLASSES": 6, "MODEL__RETINANET__SCORE_THRESH_TEST": 0.0}
    weak = write_teacher(tmp_path, "retinanet", MODEL__RETINANET__NORM="", **values)
    teacher = {"CONFIG_FILE": weak[1], "WEIGHTS": weak[3]}
    staged.DISTILL.TEACHER.merge_from_list([x for pair in teacher.items() for x in pair])
    staged.DISTILL.STAGES[1]["TEACHER"] = teacher
    staged.DISTILL.TEACHER.EVAL_IMAGES, staged.DISTILL.TEACHER.MIN_AP = 2, 0.0
    staged.DATASETS.TEST = ("d2kd_shapes_val",)
    caplog.set_level("INFO", logger="d2kd")
    train_stages(staged, Interrupt(0))
    for name in ("stage_1", "stage_2"):
        assert f"{name}: The teacher has " in caplog.text
        assert (Path(staged.OUTPUT_DIR) / f"teacher_{name}_worst.png").stat().st_size > 1000


def test_teacher_of_a_run_without_stages_is_evaluated_once(
    staged: CfgNode, evaluated: List[str]
) -> None:
    staged.DISTILL.STAGES = []
    train_stages(staged, Interrupt(0))
    assert evaluated == [staged.DISTILL.TEACHER.WEIGHTS]
    # Nothing was saved: it begins anew, and dies behind a checkpoint.
    train_stages(staged, Interrupt(2), resume=True)
    assert len(evaluated) == 2
    with mock.patch.object(Trainer, "train", side_effect=Interruption):
        train_stages(staged, resume=True)
    assert len(evaluated) == 2


def test_one_trainer_does_not_run_several_stages(staged: CfgNode) -> None:
    with pytest.raises(ValueError, match="d2kd.engine.train runs them all"):
        Trainer(staged)


# What a stage begins with ------------------------------------------------------------------------


def part(state: Dict[str, torch.Tensor], prefix: str) -> Dict[str, torch.Tensor]:
    return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}


def test_student_and_its_running_mean_are_carried_over(whole: Dict[str, Any]) -> None:
    recorder = whole["recorder"]
    end = part(recorder.end[0], "student.")
    assert_same_tensors(part(recorder.start[1], "student."), end)
    assert_same_tensors(saved(whole["cfg"], "model_stage_1_final.pth")["model"], end)
    assert recorder.means[2] == recorder.means[1] != recorder.means[0]


def test_heads_start_anew(whole: Dict[str, Any]) -> None:
    recorder = whole["recorder"]
    first, second = (part(x, "heads.MGD.") for x in recorder.start)
    assert_same_tensors(second, first)
    trained = part(recorder.end[0], "heads.MGD.")
    assert all(not torch.equal(v, second[k]) for k, v in trained.items() if "generator" in k)


def test_teacher_and_heads_are_those_of_the_stage(
    whole: Dict[str, Any], teacher: List[Any], stronger: Dict[str, str]
) -> None:
    checkpoints = [saved(whole["cfg"], x) for x in ("model_stage_1_final.pth", "model_final.pth")]
    assert len({x["teacher"]["weights_sha256"] for x in checkpoints}) == 2
    assert [x["trainer"]["heads"] for x in checkpoints] == [["MGD"], ["MGD", "PKD"]]
    assert sorted(whole["scalars"]["loss_mgd"]) == [0, 1, 2, 3, 4, 5]
    assert sorted(whole["scalars"]["loss_pkd"]) == [3, 4, 5]


def test_weight_schedules_count_from_the_start_of_the_stage(whole: Dict[str, Any]) -> None:
    weights = whole["scalars"]["MGD/weight"]
    full = whole["cfg"].DISTILL.MGD.LOSS_WEIGHT
    assert [weights[i] for i in range(6)] == [full / 2, full, full] * 2


def test_heads_of_each_stage_are_watched_in_its_own_first_steps(whole: Dict[str, Any]) -> None:
    # Before the first of the three steps that are looked at, and behind the third.
    facts = read_facts(whole["cfg"].OUTPUT_DIR)
    found = {x["iteration"]: x for x in facts if x["kind"] == "gradients"}
    assert list(found) == [0, 2, 3, 5]
    assert [set(found[i]["heads"]) for i in (2, 5)] == [{"MGD"}, {"MGD", "PKD"}]
    for fact in found.values():  # a schedule that is not the stage's would have ended
        assert "LOSS_WEIGHT" in fact["hint"] and "LOSS_WEIGHT 0 (" not in fact["hint"]


def test_entry_with_another_teacher_has_nothing_of_the_first_teacher_s_classes(
    staged: CfgNode, stronger: Dict[str, str]
) -> None:
    names = ["a", "b", "c"]
    staged.DISTILL.TEACHER.CLASSES = names
    staged.DISTILL.TEACHER.ALIASES, staged.DISTILL.TEACHER.FOR_CLASSES = [["disc", "a"]], ["disc"]
    staged.DISTILL.STAGES.append({"ITERATIONS": 3, "TEACHER": {"MIN_AP": 5.0}})
    staged.SOLVER.MAX_ITER, staged.SOLVER.STEPS = 9, ()
    first, second, third = (x.cfg.DISTILL.TEACHER for x in plan_stages(staged))
    assert first.CLASSES == third.CLASSES == names, "of the same teacher they stay"
    assert second.CONFIG_FILE == stronger["CONFIG_FILE"]
    assert second.CLASSES == second.ALIASES == second.FOR_CLASSES == []


def test_final_model_is_that_of_the_whole_run(whole: Dict[str, Any]) -> None:
    files = {x for x in os.listdir(whole["cfg"].OUTPUT_DIR) if x.endswith(".pth")}
    first = {"model_stage_1_0000001.pth", "model_stage_1_final.pth"}
    assert files == first | {"model_0000003.pth", "model_0000005.pth", "model_final.pth"}


def test_stage_is_beside_the_losses(whole: Dict[str, Any]) -> None:
    lines = (Path(whole["cfg"].OUTPUT_DIR) / "metrics.json").read_text().splitlines()
    entries = [x for x in map(json.loads, lines) if "total_loss" in x]
    assert [(x["iteration"], x["stage"]) for x in entries] == [(2, 1), (5, 2)]


def test_log_names_each_stage_and_only_one_teacher_is_in_memory(
    staged: CfgNode, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: List[Any] = []
    build_model = Trainer.build_model

    def count(self: Trainer, cfg: CfgNode) -> torch.nn.Module:
        alive = sum(x() is not None for x, _ in built)
        model = build_model(cfg)
        built.append((weakref.ref(model.teacher.model), alive))
        return model

    monkeypatch.setattr(Trainer, "build_model", count)
    staged.merge_from_list(["SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "SOLVER.WARMUP_ITERS", 0])
    staged.DISTILL.MGD.SCHEDULE.WARMUP_ITERS = 0
    for stage in staged.DISTILL.STAGES:
        stage["ITERATIONS"] = 1
    with caplog.at_level(logging.INFO, logger="d2kd"):
        train(staged)
    lines = [x for x in caplog.messages if x.startswith("Stage ")]
    assert lines == [str(x) for x in plan_stages(staged)]
    assert [alive for _, alive in built] == [0, 0]


# Learning rate -----------------------------------------------------------------------------------


def learning_rates(cfg: CfgNode, iterations: int) -> List[float]:
    """Of a run of Detectron2 with SOLVER."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.BASE_LR)
    scheduler, rates = build_lr_scheduler(cfg, optimizer), []
    for _ in range(iterations):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_learning_rate_restarts_with_each_stage(whole: Dict[str, Any]) -> None:
    cfg = whole["cfg"].clone()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 3, (2,)
    expected = learning_rates(cfg, 3)
    assert len(set(expected)) == 3
    assert list(whole["scalars"]["lr"].values()) == expected * 2


def test_learning_rate_goes_on_through_stages_and_interruptions(staged: CfgNode) -> None:
    staged.DISTILL.STAGE_LR = "continue"
    expected = learning_rates(staged, 6)
    seen = all_scalars(train_stages(staged, Interrupt(5)))["lr"]
    seen.update(all_scalars(train_stages(staged, resume=True))["lr"])
    assert [seen[i] for i in range(6)] == expected


@pytest.mark.parametrize("stage_lr", ["restart", "continue"])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_new_learning_rate_counts_in_a_resumed_stage(
    stage_lr: str, whole: Dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    cfg = whole["cfg"].clone()
    cfg.DISTILL.STAGE_LR, cfg.SOLVER.BASE_LR = stage_lr, 0.5
    stage = plan_stages(cfg)[1]
    trainer = Trainer(stage.cfg, stage)
    trainer.resume_or_load()
    new = Trainer(stage.cfg, stage)
    for _ in range(stage.end - stage.start):
        new.scheduler.step()
    rates = [[x["lr"] for x in t.optimizer.param_groups] for t in (trainer, new)]
    assert rates[0] == rates[1]
    assert "SOLVER.BASE_LR" in caplog.text


# Resuming ----------------------------------------------------------------------------------------


def test_run_that_is_interrupted_anywhere_equals_an_uninterrupted_one(
    whole: Dict[str, Any], staged: CfgNode
) -> None:
    expected = whole["scalars"]
    train_stages(staged, Interrupt(2))
    # In the first stage, at its end, and in the second.
    for begins_at, stage, dies_in in ((2, 1, 3), (3, 2, 5), (4, 2, 6)):
        assert not (Path(staged.OUTPUT_DIR) / "model_final.pth").exists()
        trainers = train_stages(staged, Interrupt(dies_in), resume=True)
        assert trainers[0].stage.index == stage
        resumed = all_scalars(trainers)
        for name, values in expected.items():
            found = {i: v for i, v in resumed.get(name, {}).items() if i < dies_in}
            assert found == {i: v for i, v in values.items() if begins_at <= i < dies_in}, name
    ours, theirs = saved(staged), saved(whole["cfg"])
    assert_same_checkpoint(ours, theirs)
    assert ours["teacher"] == theirs["teacher"]
    # The learning rate among them
    assert ours["trainer"]["hooks"] == theirs["trainer"]["hooks"]


def test_run_without_a_seed_resumes_in_the_second_stage_with_that_of_the_first(
    staged: CfgNode,
) -> None:
    staged.SEED = -1
    seeds = [x.seed for x in train_stages(staged, Interrupt(4))]
    seeds += [x.seed for x in train_stages(staged, resume=True)]
    assert len(seeds) == 3 and len(set(seeds)) == 1


def test_finished_run_is_not_trained_again(whole: Dict[str, Any]) -> None:
    (trainer,) = train_stages(whole["cfg"], resume=True)
    assert trainer.stage.index == 2 and trainer.start_iter == 6
    assert "total_loss" not in scalars(trainer)


def test_other_stages_than_those_of_the_checkpoint_are_refused(whole: Dict[str, Any]) -> None:
    cfg = whole["cfg"].clone()
    for stage, iterations in zip(cfg.DISTILL.STAGES, (2, 4)):
        stage["ITERATIONS"] = iterations
    cfg.SOLVER.STEPS = ()
    with pytest.raises(ValueError, match="began at iteration 3; by DISTILL.STAGES it begins at 2"):
        train(cfg, resume=True)


def test_next_stage_does_not_begin_with_what_would_make_another_run(staged: CfgNode) -> None:
    train_stages(staged, Interrupt(3))  # the checkpoint is that of the end of the first stage
    other = staged.clone()
    other.SEED += 1
    with pytest.raises(ValueError, match=f"SEED: {staged.SEED}, now {other.SEED}: the images"):
        train(other, resume=True)
    other = staged.clone()
    other.MODEL.RETINANET.NUM_CONVS = 2
    # Of an earlier version, a checkpoint has no config that would tell.
    path = Path(staged.OUTPUT_DIR, "model_stage_1_final.pth")
    checkpoint = saved(staged, path.name)
    del checkpoint["trainer"]["config"]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match="another student: 'head.*' is not in both"):
        train(other, resume=True)


def test_teacher_of_a_stage_that_has_moved_is_the_same_on_resume(
    staged: CfgNode, teacher: List[Any], tmp_path: Path
) -> None:
    train_stages(staged, Interrupt(5))
    node = staged.DISTILL.STAGES[1]["TEACHER"]
    for key in ("CONFIG_FILE", "WEIGHTS"):
        node[key] = shutil.copy(node[key], tmp_path)
    (trainer,) = train_stages(staged, Interrupt(4), resume=True)
    assert trainer.start_iter == 4
    node["WEIGHTS"] = dict(zip(teacher[0::2], teacher[1::2]))["DISTILL.TEACHER.WEIGHTS"]
    with pytest.raises(ValueError, match="another teacher: weights_sha256 differs"):
        train(staged, resume=True)


def test_best_value_is_carried_over_and_the_end_of_a_stage_is_evaluated(
    staged: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged.DATASETS.TEST = ("d2kd_shapes_val",)
    # Only at the ends of the stages, which are saved before they are evaluated.
    values = iter([9.0, 5.0])
    monkeypatch.setattr(Trainer, "test", lambda *_: {"bbox": {"AP": next(values)}})
    train(staged)
    best, first = saved(staged, "model_best.pth"), saved(staged, "model_stage_1_final.pth")
    assert_same_tensors(best["model"], first["model"])
    assert next(values, None) is None


def test_evaluation_at_the_end_of_a_stage_that_was_interrupted_is_made_up_for(
    staged: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged.DATASETS.TEST = ("d2kd_shapes_val",)
    answers = iter([])
    monkeypatch.setattr(Trainer, "test", lambda *_: {"bbox": {"AP": next(answers)}})
    with pytest.raises(StopIteration):
        train(staged)
    end = saved(staged, "model_stage_1_final.pth")
    answers = iter([9.0, 5.0])
    train(staged, resume=True)
    assert_same_tensors(saved(staged, "model_best.pth")["model"], end["model"])
    assert Metrics(staged.OUTPUT_DIR).curve("bbox/AP") == ([3, 6], [9.0, 5.0])
    # One that was logged is not repeated.
    os.remove(Path(staged.OUTPUT_DIR) / "model_final.pth")
    (Path(staged.OUTPUT_DIR) / "last_checkpoint").write_text("model_stage_1_final.pth")
    answers = iter([5.0])
    train(staged, resume=True)


# Two processes -----------------------------------------------------------------------------------


def in_each_process(
    folder: Path, teacher: List[Any], stronger: Dict[str, str], output: Path
) -> None:
    recorder = Recorder()
    train_stages(staged_config(folder, teacher, stronger, output), recorder)
    found = {"start": recorder.start, "end": recorder.end, "means": recorder.means}
    torch.save(found, output / f"rank_{comm.get_rank()}.pth")


@pytest.mark.process
@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_second_process_begins_a_stage_with_what_the_first_has_saved(
    folder: Path, teacher: List[Any], stronger: Dict[str, str], tmp_path: Path
) -> None:
    launch_two(in_each_process, folder, teacher, stronger, tmp_path)
    ranks = [torch.load(tmp_path / f"rank_{i}.pth") for i in range(2)]
    end = torch.load(tmp_path / "model_stage_1_final.pth", weights_only=True)["model"]
    for found in ranks:
        assert_same_tensors(part(found["start"][1], "student."), end)
        assert found["means"][2] == found["means"][1]
    assert ranks[0]["means"][2] != ranks[1]["means"][2], "each process has its own"
    # So has BatchNorm its own statistics, of each process's images.
    for key, value in ranks[0]["end"][1].items():
        assert "running_" in key or torch.equal(ranks[1]["end"][1][key], value), key
