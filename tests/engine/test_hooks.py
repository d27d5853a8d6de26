"""Seeds of an iteration, the best checkpoint, the running mean of RetinaNet's losses."""

import json
import math
import random
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import numpy as np
import pytest
import torch
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.utils import comm

from d2kd.checkpoint import PlainCheckpointer
from d2kd.engine import Trainer
from d2kd.engine.evaluator import best_metric
from d2kd.engine.hooks import (
    BestCheckpointer,
    KeepLossNormalizer,
    SeedEachIteration,
    seed_everything,
)
from d2kd.weights.run_checkpoints import last_whole_checkpoint
from tests.helpers.runs import (
    Interruption,
    assert_same_tensors,
    build_trainer,
    interrupt,
    run,
    run_config,
)


class Draws(HookBase):
    """What the three random generators give in each iteration."""

    def __init__(self) -> None:
        self.seen: Dict[int, Any] = {}

    def before_step(self) -> None:
        numbers = random.random(), np.random.rand(), float(torch.rand(()))
        self.seen[self.trainer.iter] = numbers


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hooks")


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Dict[int, float]:
    """Iteration to the bbox/AP that the evaluation after it is to find."""
    values: Dict[int, float] = {}
    build_hooks = Trainer.build_hooks

    def with_answers(self: Trainer) -> List[Any]:
        last = self.max_iter - 1
        self.test = lambda cfg, model: {"bbox": {"AP": values[min(self.iter, last)]}}
        return build_hooks(self)

    monkeypatch.setattr(Trainer, "build_hooks", with_answers)
    return values


def best_config(folder: Path, output: Path, **overrides: Any) -> CfgNode:
    """A save and an evaluation after every iteration."""
    values = {
        "OUTPUT_DIR": str(output),
        "DATASETS__TEST": ("d2kd_shapes_val",),
        "TEST__EVAL_PERIOD": 1,
        "SOLVER__CHECKPOINT_PERIOD": 1,
    }
    return run_config(folder, **{**values, **overrides})


def weights(output: Path, name: str) -> Dict[str, torch.Tensor]:
    return torch.load(output / f"{name}.pth", weights_only=True)["model"]


def test_seed_is_a_function_of_all_its_numbers() -> None:
    draws = {}
    for entropy in [(1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 0, 0)]:
        seed_everything(*entropy)
        draws[entropy] = random.random(), np.random.rand(), float(torch.rand(()))
    assert len(set(draws.values())) == 4
    seed_everything(1, 1, 0)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == draws[1, 1, 0]


def test_draws_of_an_iteration_do_not_depend_on_what_was_drawn_before() -> None:
    class FakeTrainer:
        iter = 5

    hook, draws = SeedEachIteration(3), []
    hook.trainer = FakeTrainer()
    for count in (0, 7):
        torch.rand(count), np.random.rand(count)
        hook.before_step()
        draws.append((random.random(), np.random.rand(), float(torch.rand(()))))
    assert draws[0] == draws[1]


def test_iterations_and_processes_draw_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    hook, draws = SeedEachIteration(3), set()
    for iteration, rank in product((5, 6), (0, 1)):
        hook.trainer = SimpleNamespace(iter=iteration)
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        hook.before_step()
        draws.add(float(torch.rand(())))
    assert len(draws) == 4


def test_running_mean_is_kept_for_every_checkpoint_and_the_last_one() -> None:
    hook, kept = KeepLossNormalizer(SimpleNamespace(loss_normalizer=7.0), period=2), []
    for iteration in range(5):
        hook.values, hook.trainer = [], SimpleNamespace(iter=iteration, max_iter=5)
        hook.after_step()
        kept.append(hook.state_dict()["values"])
    assert kept == [[], [7.0], [], [7.0], [7.0]]


@pytest.mark.parametrize("processes, rank, expected", [(2, 0, 2.0), (2, 1, 6.0), (1, 0, 4.0)])
def test_running_mean_comes_back_to_its_process_or_is_averaged_for_another_number_of_them(
    processes: int, rank: int, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comm, "get_world_size", lambda: processes)
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    detector = SimpleNamespace(loss_normalizer=100.0)
    KeepLossNormalizer(detector, period=2).load_state_dict({"values": [2.0, 6.0]})
    assert detector.loss_normalizer == expected


def test_draws_of_an_iteration_are_the_same_after_resume(folder: Path, tmp_path: Path) -> None:
    whole, resumed = Draws(), Draws()
    run(run_config(folder, OUTPUT_DIR=str(tmp_path / "whole")), whole)
    cfg = run_config(folder, OUTPUT_DIR=str(tmp_path / "parts"))
    interrupt(cfg, 2)
    run(cfg, resumed, resume=True)
    assert len(set(whole.seen.values())) == 4
    assert resumed.seen == {i: whole.seen[i] for i in (2, 3)}


def test_best_checkpoint_is_the_student_of_the_best_evaluation(
    folder: Path, tmp_path: Path, answers: Dict[int, float]
) -> None:
    answers.update({0: float("nan"), 1: 5.0, 2: 3.0, 3: 5.0})
    cfg = best_config(folder, tmp_path)
    run(cfg)
    assert_same_tensors(weights(tmp_path, "model_best"), weights(tmp_path, "model_0000001"))
    student = build_model(cfg)
    DetectionCheckpointer(student).load(str(tmp_path / "model_best.pth"))
    assert_same_tensors(student.state_dict(), weights(tmp_path, "model_0000001"))


def test_larger_values_alone_are_the_best_and_none_of_an_iteration_that_failed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved: List[int] = []
    checkpointer = SimpleNamespace(save=lambda name, iteration: saved.append(iteration))
    hook = BestCheckpointer(1, checkpointer, "bbox/AP")

    def evaluated(iteration: int, value: float) -> None:
        storage = SimpleNamespace(latest=lambda: {"bbox/AP": (value, iteration)})
        hook.trainer = SimpleNamespace(iter=iteration, max_iter=7, storage=storage)

    for iteration, value in enumerate([math.nan, 5.0, 3.0, math.nan, 5.0, 6.0]):
        evaluated(iteration, value)
        hook.after_step()
    assert saved == [1, 5]
    assert caplog.text.count("bbox/AP is not a number, so model_best.pth is not written") == 2
    evaluated(6, 9.0)
    hook.after_step()  # the evaluation of the end is still to come
    hook.after_train()  # a trainer that has come to its end is at iteration 7
    assert saved == [1, 5]
    evaluated(7, 9.0)
    hook.after_train()
    assert saved == [1, 5, 7]


def test_best_checkpoint_is_never_the_one_to_resume_from(
    folder: Path, tmp_path: Path, answers: Dict[int, float]
) -> None:
    answers.update({i: float(i) for i in range(4)})
    cfg = best_config(folder, tmp_path)
    interrupt(cfg, 2)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    assert (tmp_path / "model_best.pth").exists()
    assert build_trainer(cfg, resume=True).start_iter == 2
    run(cfg, resume=True)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def test_best_checkpoint_before_any_other_is_not_one_to_resume_from(
    folder: Path, tmp_path: Path, answers: Dict[int, float]
) -> None:
    answers.update({i: float(i) for i in range(4)})
    cfg = best_config(folder, tmp_path, SOLVER__CHECKPOINT_PERIOD=3)
    interrupt(cfg, 1)
    assert (tmp_path / "model_best.pth").exists()
    assert build_trainer(cfg, resume=True).start_iter == 0


def test_run_that_dies_with_its_best_checkpoint_goes_on_from_the_last(
    folder: Path, tmp_path: Path, answers: Dict[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers.update({i: float(i) for i in range(4)})
    save = PlainCheckpointer.save

    def save_and_die(self: PlainCheckpointer, name: str, **kwargs: Any) -> None:
        save(self, name, **kwargs)
        if (name, kwargs["iteration"]) == ("model_best", 2):
            raise Interruption

    monkeypatch.setattr(PlainCheckpointer, "save", save_and_die)
    cfg = best_config(folder, tmp_path, SOLVER__CHECKPOINT_PERIOD=2)
    with pytest.raises(Interruption):
        run(cfg)
    # Not from iteration 3, for which the losses' running mean was not looked up.
    assert last_whole_checkpoint(str(tmp_path)).endswith("model_0000001.pth")
    assert build_trainer(cfg, resume=True).start_iter == 2


@pytest.mark.parametrize("dies_in", [2, 3])
def test_best_value_survives_resume(
    dies_in: int, folder: Path, tmp_path: Path, answers: Dict[int, float]
) -> None:
    # In one case the last save is that of the best iteration itself, made before its evaluation.
    answers.update({0: 1.0, 1: 5.0, 2: 3.0, 3: 4.0})
    cfg = best_config(folder, tmp_path)
    interrupt(cfg, dies_in)
    run(cfg, resume=True)
    assert_same_tensors(weights(tmp_path, "model_best"), weights(tmp_path, "model_0000001"))


def test_a_new_run_does_not_inherit_the_best_value_of_an_old_one(
    folder: Path, tmp_path: Path, answers: Dict[int, float]
) -> None:
    answers.update({0: 9.0, 1: 1.0, 2: 2.0, 3: 1.0})
    run(best_config(folder, tmp_path))
    answers.update({0: 1.0, 1: 1.0, 2: 2.0, 3: 1.0})
    run(best_config(folder, tmp_path))
    assert_same_tensors(weights(tmp_path, "model_best"), weights(tmp_path, "model_0000002"))


@pytest.mark.parametrize("key, value", [("metric", "bbox/AP50"), ("datasets", ["b"])])
def test_best_value_of_another_metric_or_test_set_is_not_compared(
    key: str, value: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = BestCheckpointer(1, Checkpointer(nn.Linear(1, 1), str(tmp_path)), "bbox/AP", ["a"])
    old.best = 40.0
    measure = {"metric": "bbox/AP", "datasets": ["a"], **{key: value}}
    old.checkpointer.save("model_best")
    same = BestCheckpointer(1, old.checkpointer, "bbox/AP", ["a"])
    same.load_state_dict(old.state_dict())
    assert (same.best, same.run) == (40.0, old.run)
    assert not [x for x in caplog.records if x.levelname != "INFO"]
    other = BestCheckpointer(1, old.checkpointer, **measure)
    other.load_state_dict(old.state_dict())
    assert other.best == -math.inf
    assert "chosen by bbox/AP on a;" in caplog.text


def test_best_checkpoint_is_chosen_anew_where_a_run_goes_on_with_another_test_set(
    folder: Path, tmp_path: Path, answers: Dict[int, float]
) -> None:
    answers.update({0: 9.0, 1: 8.0})
    cfg = best_config(folder, tmp_path)
    interrupt(cfg, 2)
    cfg.DATASETS.TEST = ("d2kd_shapes_train",)
    answers.update({2: 1.0, 3: 2.0})
    run(cfg, resume=True)
    assert_same_tensors(weights(tmp_path, "model_best"), weights(tmp_path, "model_0000003"))


def test_best_value_on_other_labels_is_not_compared(
    tmp_path: Path, forget_sets: None, caplog: pytest.LogCaptureFixture
) -> None:
    labels = tmp_path / "a.json"
    labels.write_text("{}")
    register_coco_instances("a", {}, str(labels), str(tmp_path))
    checkpointer = Checkpointer(nn.Linear(1, 1), str(tmp_path))
    old = BestCheckpointer(1, checkpointer, "bbox/AP", ["a"])
    old.best = 40.0
    old.checkpointer.save("model_best")
    same = BestCheckpointer(1, checkpointer, "bbox/AP", ["a"])
    same.load_state_dict(old.state_dict())
    assert same.best == 40.0
    labels.write_text('{"mended": true}')
    mended = BestCheckpointer(1, checkpointer, "bbox/AP", ["a"])
    mended.load_state_dict({k: v for k, v in old.state_dict().items() if k != "truth"})
    assert mended.best == 40.0, "of a checkpoint from before labels were compared"
    mended = BestCheckpointer(1, checkpointer, "bbox/AP", ["a"])
    mended.load_state_dict(old.state_dict())
    assert mended.best == -math.inf
    assert "chosen by bbox/AP on a, of which the JSON has changed" in caplog.text


def test_without_a_test_set_no_best_checkpoint_is_kept(folder: Path, tmp_path: Path) -> None:
    run(run_config(folder, OUTPUT_DIR=str(tmp_path)))
    assert not (tmp_path / "model_best.pth").exists()


def evaluations(output: Path) -> Dict[int, float]:
    """Iteration to bbox/AP, as logged."""
    lines = map(json.loads, (output / "metrics.json").read_text().splitlines())
    return {x["iteration"]: x["bbox/AP"] for x in lines if "bbox/AP" in x}


def test_evaluation_that_was_interrupted_is_made_up_for(
    folder: Path, tmp_path: Path, answers: Dict[int, float]
) -> None:
    # It dies in the evaluation after iteration 1, whose checkpoint was saved before.
    cfg = best_config(folder, tmp_path, TEST__EVAL_PERIOD=2)
    with pytest.raises(KeyError):
        run(cfg)
    assert not evaluations(tmp_path)
    answers.update({1: 5.0, 3: 4.0})
    run(cfg, resume=True)
    assert evaluations(tmp_path)[1] == 5.0
    assert_same_tensors(weights(tmp_path, "model_best"), weights(tmp_path, "model_0000001"))


def test_evaluation_of_an_earlier_run_in_the_folder_does_not_stand_in_for_one(
    folder: Path, tmp_path: Path, answers: Dict[int, float]
) -> None:
    cfg = best_config(folder, tmp_path, TEST__EVAL_PERIOD=2)
    answers.update({1: 9.0, 3: 9.0})
    run(cfg)
    answers.clear()
    with pytest.raises(KeyError):
        run(cfg)
    answers.update({1: 5.0, 3: 4.0})
    run(cfg, resume=True)
    assert evaluations(tmp_path)[1] == 5.0
    assert_same_tensors(weights(tmp_path, "model_best"), weights(tmp_path, "model_0000001"))


def test_evaluation_that_was_logged_is_not_repeated(
    folder: Path, tmp_path: Path, answers: Dict[int, float]
) -> None:
    answers.update({0: 1.0, 1: 5.0})
    cfg = best_config(folder, tmp_path)
    interrupt(cfg, 2)
    del answers[1]  # to ask for it again would be an error
    answers.update({2: 3.0, 3: 4.0})
    run(cfg, resume=True)
    assert evaluations(tmp_path)[1] == 5.0


def test_running_mean_of_the_losses_is_restored_by_resume(folder: Path, tmp_path: Path) -> None:
    cfg = run_config(folder, OUTPUT_DIR=str(tmp_path))
    mean = run(cfg).model.loss_normalizer
    assert mean != 100  # where it starts
    assert build_trainer(cfg, resume=True).model.loss_normalizer == mean


def test_best_checkpoint_that_is_gone_is_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hook = BestCheckpointer(1, Checkpointer(nn.Linear(1, 1), str(tmp_path)), "bbox/AP")
    hook.best = 40.0
    state = hook.state_dict()
    hook.load_state_dict(state)
    assert hook.best == -math.inf and "model_best.pth cannot be read" in caplog.text
    caplog.clear()
    hook.load_state_dict({**state, "best": -math.inf})  # there never was one
    assert not caplog.records


def test_of_several_test_sets_the_first_chooses_and_each_keeps_its_detections(
    folder: Path, tmp_path: Path
) -> None:
    cfg = best_config(folder, tmp_path, DATASETS__TEST=("d2kd_shapes_val", "d2kd_shapes_train"))
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    assert best_metric(cfg) == "d2kd_shapes_val/bbox/AP"
    run(cfg)
    assert (tmp_path / "model_best.pth").exists()
    for name, images in (("d2kd_shapes_val", 4), ("d2kd_shapes_train", 8)):
        path = tmp_path / "inference" / name / "coco_instances_results.json"
        assert len({x["image_id"] for x in json.loads(path.read_text())}) == images
    cfg.TEST.BEST_METRIC = "d2kd_shapes_train/bbox/AP50"
    assert best_metric(cfg) == cfg.TEST.BEST_METRIC
    cfg.DATASETS.TEST = ("d2kd_shapes_train",)  # a single set's name is not in its results
    assert best_metric(cfg) == "bbox/AP50"
