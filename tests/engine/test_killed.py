"""Killed by SIGKILL anywhere, a run goes on to the same losses and the same end, to the bit."""

import io
import json
import os
import signal
from pathlib import Path
from typing import Any, List

import pytest
import torch

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm

from d2kd.checkpoint import PlainCheckpointer
from d2kd.engine import Trainer, train
from d2kd.weights.run_checkpoints import last_whole_checkpoint
from tests.helpers.forks import fork, in_clean_process, launch_two
from tests.helpers.runs import assert_same_checkpoint, at, run_config, saved
from tests.helpers.toys import write_teacher

pytestmark = pytest.mark.process

ITERATIONS = 8


@pytest.fixture(scope="module")
def cfg(folder: Path, teacher: List[Any]) -> CfgNode:
    """
    3 iterations with a RetinaNet's pyramid and cells, then 5 with a Faster R-CNN's and its regions:
    masks are drawn, a queue fills and overflows, weights rise and fall. Saved after iterations 1
    and 2 (the first stage's end), 3, 5 and 7 (twice).
    """
    two_stage = write_teacher(folder, "faster_rcnn", MODEL__FPN__OUT_CHANNELS=64)
    cfg = run_config(folder, teacher, ["MGD", "CKD"], SOLVER__MAX_ITER=ITERATIONS)
    cfg.SOLVER.STEPS = ()
    cfg.DISTILL.STAGES = [
        {"ITERATIONS": 3},
        {"ITERATIONS": 5, "TEACHER": {"CONFIG_FILE": two_stage[1], "WEIGHTS": two_stage[3]}},
    ]
    cfg.DISTILL.MGD.SCHEDULE.WARMUP_ITERS = 3
    cfg.DISTILL.MGD.SCHEDULE.DECAY, cfg.DISTILL.MGD.SCHEDULE.DECAY_FROM = "linear", 2
    cfg.DISTILL.CKD.SCHEDULE.DECAY = "cosine"
    cfg.DISTILL.CKD.QUEUE_SIZE, cfg.DISTILL.REGIONS.PER_IMAGE = 80, 16
    return cfg


# Where it dies ------------------------------------------------------------------------------------


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Die(HookBase):
    """In a step, behind the optimizer's and before a save."""

    def __init__(self, iteration: int, rank: int = 0):
        self.iteration, self.rank = iteration, rank

    def after_step(self) -> None:
        if (self.trainer.iter, comm.get_rank()) == (self.iteration, self.rank):
            kill()


def die_while_saving(name: str) -> None:
    """When half of a checkpoint is on the disk."""
    save, write = PlainCheckpointer.save, torch.save

    def half(data: Any, file: Any) -> None:
        whole = io.BytesIO()
        write(data, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        kill()

    def save_or_die(self: PlainCheckpointer, saving: str, **kwargs: Any) -> None:
        if saving == name and comm.is_main_process():
            torch.save = half
        save(self, saving, **kwargs)

    PlainCheckpointer.save = save_or_die


def die_before_naming(name: str) -> None:
    """When a checkpoint is written, but not yet named as the last."""
    tag = PlainCheckpointer.tag_last_checkpoint

    def tag_or_die(self: PlainCheckpointer, written: str) -> None:
        if written == f"{name}.pth":
            kill()
        tag(self, written)

    PlainCheckpointer.tag_last_checkpoint = tag_or_die


# How the run dies, again and again, and the checkpoint that is then there to go on from
DEATHS = {
    "in a step of stage 1": (lambda: Die(2), "model_stage_1_0000001.pth"),
    "while saving": (lambda: die_while_saving("model_0000005"), "model_0000003.pth"),
    "before naming": (lambda: die_before_naming("model_0000005"), "model_0000003.pth"),
    "in a step of stage 2": (lambda: Die(6), "model_0000005.pth"),
    "saving the end": (lambda: die_while_saving("model_final"), "model_0000007.pth"),
}
DEATHS_OF_TWO = {
    "two while saving": (lambda: die_while_saving("model_0000005"), "model_0000003.pth"),
    "one of two": (lambda: Die(6, rank=1), "model_0000005.pth"),
}


# What it leaves -----------------------------------------------------------------------------------


class WriteScalars(HookBase):
    """Adds a line for each step to scalars.json: every loss and weight, and the learning rate."""

    def after_step(self) -> None:
        if not comm.is_main_process():
            return
        trainer = self.trainer
        latest = {k: v for k, (v, i) in trainer.storage.latest().items() if i == trainer.iter}
        kept = {k: v for k, v in latest.items() if "loss" in k or k.endswith("/weight")}
        kept["next lr"] = trainer.optimizer.param_groups[0]["lr"]
        with open(Path(trainer.cfg.OUTPUT_DIR, "scalars.json"), "a") as file:
            file.write(json.dumps([trainer.iter, kept]) + "\n")


def scalars(cfg: CfgNode) -> List[Any]:
    """[iteration, {name: value}] of all steps, also of those that were lost and made again."""
    return [json.loads(x) for x in Path(cfg.OUTPUT_DIR, "scalars.json").read_text().splitlines()]


def assert_same_run(killed: CfgNode, whole: CfgNode) -> None:
    """Every loss of every step, and all that the last checkpoint has, are equal to the bit."""
    expected, found = dict(scalars(whole)), scalars(killed)
    assert list(expected) == list(range(ITERATIONS)) == sorted({i for i, _ in found})
    assert {"total_loss", "loss_cls", "loss_mgd", "loss_ckd", "MGD/weight"} <= set(expected[0])
    for iteration, values in found:
        assert values == expected[iteration], iteration
    ours, theirs = saved(killed), saved(whole)
    assert_same_checkpoint(ours, theirs)
    assert len(theirs["distill_heads"]["CKD._extra_state"]["queue"]) == 80, "the queue is full"
    rest = [{k: v for k, v in x["trainer"].items() if k != "_trainer"} for x in (ours, theirs)]
    assert rest[0] == rest[1] and ours["teacher"] == theirs["teacher"]


# The tests ----------------------------------------------------------------------------------------


def train_and_write(cfg: CfgNode, death: str = "", resume: bool = False) -> None:
    """For processes of their own: what is patched here stays so."""
    hook = {**DEATHS, **DEATHS_OF_TWO}[death][0]() if death else None
    hooks = [WriteScalars(), hook] if hook else [WriteScalars()]
    build_hooks = Trainer.build_hooks
    Trainer.build_hooks = lambda self: [*hooks, *build_hooks(self)]
    train(cfg, resume=resume)


def kill_again_and_again(killed: CfgNode, whole: CfgNode) -> None:
    assert fork(train_and_write, whole) == 0
    for i, (death, (_, last)) in enumerate(DEATHS.items()):
        assert fork(train_and_write, killed, death, i > 0) == -signal.SIGKILL, death
        assert last_whole_checkpoint(killed.OUTPUT_DIR).endswith(f"/{last}"), death
        assert not Path(killed.OUTPUT_DIR, "model_final.pth").exists()
    assert fork(train_and_write, killed, "", True) == 0


def test_killed_run_resumes_to_the_same_losses_and_the_same_end(
    cfg: CfgNode, tmp_path: Path
) -> None:
    killed, whole = at(cfg, tmp_path, "killed"), at(cfg, tmp_path, "whole")
    in_clean_process(kill_again_and_again, killed, whole)
    assert_same_run(killed, whole)
    assert not list(Path(killed.OUTPUT_DIR).glob("*.unfinished"))


def kill_two_again_and_again(killed: CfgNode, whole: CfgNode) -> None:
    launch_two(train_and_write, whole, start_method="fork")
    for i, (death, (_, last)) in enumerate(DEATHS_OF_TWO.items()):
        with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
            launch_two(train_and_write, killed, death, i > 0, start_method="fork")
        assert last_whole_checkpoint(killed.OUTPUT_DIR).endswith(f"/{last}"), death
    launch_two(train_and_write, killed, "", True, start_method="fork")


def test_two_processes_that_are_killed_resume_to_the_same_losses_and_the_same_end(
    cfg: CfgNode, tmp_path: Path
) -> None:
    killed, whole = at(cfg, tmp_path, "killed"), at(cfg, tmp_path, "whole")
    in_clean_process(kill_two_again_and_again, killed, whole)
    assert_same_run(killed, whole)
