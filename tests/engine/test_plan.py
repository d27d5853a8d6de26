"""A run is resolved once: its config, its stages, the checkpoint that it goes on from."""

import shutil
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any, Callable, List
from unittest import mock

import pytest
import torch

from detectron2.config import CfgNode
from detectron2.utils import comm

import d2kd.engine.plan
import d2kd.engine.preflight.check_config
import d2kd.engine.resume_point
from d2kd.cli.train import main as train_main
from d2kd.config.lessons import lesson_configs
from d2kd.data.unlabelled import batch_sizes
from d2kd.engine import Trainer, train
from d2kd.engine.plan import RunPlan
from d2kd.engine.resume_point import ResumePoint
from d2kd.engine.stages import plan_stages
from tests.helpers.runs import Interrupt, Interruption, at, build_trainer, run_config


@pytest.fixture
def staged(folder: Path, teacher: List[Any], tmp_path: Path) -> CfgNode:
    """2 + 2 iterations, saved every 3 and at the end of each stage."""
    cfg = at(run_config(folder, teacher, ["PKD"], SOLVER__CHECKPOINT_PERIOD=3), tmp_path, "run")
    cfg.SOLVER.STEPS = ()
    cfg.DISTILL.STAGES = [{"ITERATIONS": 2}, {"ITERATIONS": 2}]
    return cfg


def interrupt_in(cfg: CfgNode, iteration: int) -> None:
    build_hooks = Trainer.build_hooks
    hooks = mock.patch.object(
        Trainer, "build_hooks", lambda self: [Interrupt(iteration), *build_hooks(self)]
    )
    with hooks, pytest.raises(Interruption):
        train(cfg)


def test_resumed_run_is_checked_planned_and_searched_for_once_and_its_checkpoint_read_twice(
    staged: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_in(staged, 3)
    assert ResumePoint.find(staged.OUTPUT_DIR).done == 3
    calls: Counter = Counter()

    def count(owner: Any, name: str, label: Callable[..., str]) -> None:
        function = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[label(*args)] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    def file_name(file: Any, *_: Any) -> str:
        return Path(getattr(file, "name", None) or file.filename).name

    count(d2kd.engine.plan, "check_config", lambda *_: "check_config")
    count(d2kd.engine.preflight.check_config, "plan_stages", lambda *_: "plan_stages")
    count(d2kd.engine.resume_point, "read_last_checkpoint", lambda *_: "search")
    count(zipfile.ZipFile, "testzip", lambda file: f"verify {file_name(file)}")
    count(torch, "load", lambda file, *_: f"load {file_name(file)}")
    train(staged, resume=True)
    last = "model_0000002.pth"
    assert calls.pop("load retinanet.pth"), "the teacher"
    once = ("check_config", "plan_stages", "search", f"verify {last}", f"load {last}")
    assert calls == dict.fromkeys(once, 1)


def test_plan_says_what_is_left_of_a_run(staged: CfgNode) -> None:
    new = RunPlan.resolve(staged, resume=True)
    assert new.resume_point is None and new.stages_left == new.stages and len(new.stages) == 2
    assert new.seed == staged.SEED
    interrupt_in(staged, 2)
    between = RunPlan.resolve(staged, resume=True)
    assert between.resume_point.path == between.stages[0].final_checkpoint
    assert between.resume_point.done == 2 and between.stages_left == between.stages[1:]
    assert RunPlan.resolve(staged).stages_left == between.stages, "without resume it is begun anew"
    train(staged, resume=True)
    finished = RunPlan.resolve(staged, resume=True)
    assert finished.resume_point.done == 4 and finished.stages_left == finished.stages[1:]


@pytest.mark.parametrize(
    "key, name", [("WEIGHTS", "model_best.pth"), ("CONFIG_FILE", "config.yaml")]
)
def test_run_that_would_write_over_its_teacher_is_refused_and_writes_nothing(
    key: str, name: str, staged: CfgNode
) -> None:
    node, out = staged.DISTILL.TEACHER, Path(staged.OUTPUT_DIR)
    out.mkdir()
    mine = Path(shutil.copy(node[key], out / name))
    before = mine.read_bytes()
    staged.DISTILL.STAGES = [
        {"ITERATIONS": 2},
        {"ITERATIONS": 2, "TEACHER": {**node, key: str(mine)}},
    ]
    with pytest.raises(ValueError, match=f"OUTPUT_DIR .* has the teacher's {name} "):
        train(staged)
    assert [x.name for x in out.iterdir()] == [name] and mine.read_bytes() == before
    # One of another name is in nobody's way, and neither is one in another folder.
    other = mine.rename(out / f"teacher{mine.suffix}")
    staged.DISTILL.STAGES[1]["TEACHER"][key] = str(other)
    assert RunPlan.resolve(staged).stages
    staged.DISTILL.STAGES[1]["TEACHER"][key] = str(other.rename(out.parent / name))
    assert RunPlan.resolve(staged).stages


def test_seed_left_to_chance_is_that_of_the_run_to_resume(staged: CfgNode) -> None:
    staged.SEED = -1
    interrupt_in(staged, 3)
    seed = RunPlan.resolve(staged, resume=True).seed
    assert seed == torch.load(f"{staged.OUTPUT_DIR}/model_0000002.pth")["trainer"]["seed"]
    assert RunPlan.resolve(staged).seed != seed


def test_seed_of_0_is_one_like_any_other(staged: CfgNode) -> None:
    staged.SEED, staged.DISTILL.STAGES = 0, []
    assert RunPlan.resolve(staged).seed == build_trainer(staged).seed == 0


def test_config_is_scaled_to_the_number_of_processes_once_for_plan_and_trainer(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = run_config(folder, SOLVER__REFERENCE_WORLD_SIZE=1, SOLVER__MAX_ITER=8)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    plan = RunPlan.resolve(cfg)
    (stage,) = plan.stages
    assert stage.is_whole_run and stage.cfg is plan.cfg
    assert (plan.cfg.SOLVER.IMS_PER_BATCH, stage.end) == (2 * cfg.SOLVER.IMS_PER_BATCH, 4)


@pytest.mark.parametrize("processes", [2, 8])
def test_schedules_keep_their_place_in_a_run_that_is_scaled(
    processes: int, folder: Path, teacher: List[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    solver = {"REFERENCE_WORLD_SIZE": 4, "IMS_PER_BATCH": 4, "MAX_ITER": 8}
    cfg = run_config(folder, teacher, ["PKD"], **{f"SOLVER__{k}": v for k, v in solver.items()})
    keys = {"WARMUP_ITERS": 2, "DECAY": "linear", "DECAY_FROM": 4, "STOP_ITER": 6}
    cfg.DISTILL.PKD.SCHEDULE.update(keys)
    cfg.DISTILL.CWD.SCHEDULE.STOP_ITER = -1  # never, at any length
    opts = [x for k, v in keys.items() for x in (f"DISTILL.PKD.SCHEDULE.{k}", v)]
    cfg.DISTILL.TEACHERS = [{"OPTS": opts}]
    monkeypatch.setattr(comm, "get_world_size", lambda: processes)
    cfg.freeze()
    scaled = RunPlan.resolve(cfg).cfg
    assert scaled.is_frozen()
    # Twice as many processes take half as many iterations.
    wanted = {k: v if k == "DECAY" else v * 4 // processes for k, v in keys.items()}
    (lesson,) = lesson_configs(scaled)
    for schedule in (scaled.DISTILL.PKD.SCHEDULE, lesson.cfg.DISTILL.PKD.SCHEDULE):
        assert {k: schedule[k] for k in wanted} == wanted
    assert scaled.SOLVER.MAX_ITER == 32 // processes
    assert scaled.DISTILL.CWD.SCHEDULE.STOP_ITER == -1
    assert cfg.DISTILL.PKD.SCHEDULE.STOP_ITER == cfg.DISTILL.TEACHERS[0]["OPTS"][-1] == 6


def test_shares_of_a_batch_are_those_of_the_scaled_one(
    folder: Path, teacher: List[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = run_config(folder, teacher, ["PKD"])
    cfg.DISTILL.UNLABELLED.SETS = [str(folder)]
    # 1 + 1 images are too few for two processes, which scaled have 2 + 2.
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE = 2, 1
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    assert batch_sizes(RunPlan.resolve(cfg).cfg) == (2, 2)
    # 2 + 2 are enough for one, which scaled has a single one.
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.REFERENCE_WORLD_SIZE = 4, 4
    monkeypatch.setattr(comm, "get_world_size", lambda: 1)
    with pytest.raises(ValueError, match="SHARE 0.5 of SOLVER.IMS_PER_BATCH 1 leaves"):
        RunPlan.resolve(cfg)


def test_nothing_is_written_before_the_config_is_checked(staged: CfgNode) -> None:
    called: List[str] = []
    staged.SOLVER.MAX_ITER = 5
    with pytest.raises(ValueError, match="add up to 4"):
        train(staged, on_checked=lambda: called.append("begun"))
    assert not called and not Path(staged.OUTPUT_DIR).exists()
    staged.SOLVER.MAX_ITER = 4
    RunPlan.resolve(staged, on_checked=lambda: called.append("begun"))
    assert called == ["begun"]


@pytest.mark.parametrize("content", [{"model": {}}, {"trainer": {"iteration": 3}}, [1]])
def test_weights_alone_are_no_place_to_go_on_from(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model_0000003.pth")
    Path(tmp_path, "last_checkpoint").write_text("model_0000003.pth")
    with pytest.raises(ValueError, match=r"model_0000003.pth is no checkpoint to resume from"):
        ResumePoint.find(str(tmp_path))


def test_stages_of_a_plan_are_those_of_the_config(staged: CfgNode) -> None:
    plan = RunPlan.resolve(staged)
    assert [str(x) for x in plan.stages] == [str(x) for x in plan_stages(staged)]


def test_processes_that_find_different_checkpoints_are_refused(
    staged: CfgNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_in(staged, 3)
    monkeypatch.setattr(comm, "all_gather", lambda mine: [mine, "no checkpoint"])
    with pytest.raises(
        ValueError, match="OUTPUT_DIR: .*process 0 model_0000002.pth .*process 1 no checkpoint"
    ):
        RunPlan.resolve(staged, resume=True)


def test_checkpoints_that_no_file_names_are_neither_gone_on_from_nor_lost(
    staged: CfgNode, folder: Path
) -> None:
    train(staged)
    other = staged.clone()
    other.SOLVER.BASE_LR = 0.004
    interrupt_in(other, 0)  # before its first save: what is there is the other run's
    with pytest.raises(ValueError, match="has model_final.pth, but no file last_checkpoint"):
        train(other, resume=True)
    train(other)
    (last,) = Path(other.OUTPUT_DIR).glob("last_checkpoint")
    assert last.read_text() == "model_final.pth"


@pytest.mark.parametrize("resume", [False, True])
def test_refused_run_leaves_the_folder_as_it_was(staged: CfgNode, resume: bool) -> None:
    command = ["--config-file", str(Path(staged.OUTPUT_DIR).parent / "run.yaml")]
    Path(command[-1]).write_text(staged.dump())
    train_main(command)
    names = ("config.yaml", "facts.jsonl", "last_checkpoint", "model_final.pth")
    files = [Path(staged.OUTPUT_DIR, x) for x in names]
    kept = [x.read_bytes() for x in files]
    command += ["--resume"] if resume else []
    with pytest.raises(ValueError, match="MODEL.RETINANET.NUM_CLASSES is 9"):
        train_main([*command, "MODEL.RETINANET.NUM_CLASSES", "9"])
    assert [x.read_bytes() for x in files] == kept
