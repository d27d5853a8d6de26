"""Two processes on the CPU: the same step as one process, equal weights, resume, errors."""

import multiprocessing
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable
from detectron2.engine import DEFAULT_TIMEOUT, HookBase
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from d2kd import DISTILL_HEAD_REGISTRY, build_teacher, load_config
from d2kd.engine import Trainer, launch, train
from d2kd.engine.monitor.liveness import Liveness
from d2kd.engine.parallel import _free_port, _worker, data_parallel
from d2kd.engine.preflight.teacher_check import check_teacher
from d2kd.heads import DistillPair
from d2kd.views import DetectorView
from tests.helpers.forks import cheap_processes, in_clean_process, launch_two
from tests.helpers.runs import (
    SHAPES_CLASSES,
    assert_same_tensors,
    build_trainer,
    interrupt,
    run,
    run_config,
    tensors_in,
)
from tests.helpers.toys import batch, distill_config, write_teacher

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed"),
]


def step_config(teacher: List[Any]) -> CfgNode:
    """Without batch statistics and random masks: then an image's gradient is its own."""
    cfg = distill_config("retinanet", teacher, ["MGD"], DISTILL__MGD__MASK_RATIO=0.0)
    cfg.MODEL.RESNETS.NORM = cfg.MODEL.FPN.NORM = "GN"
    cfg.MODEL.RETINANET.NORM = ""  # p7 is a single cell
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 32  # GN has 32 groups
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 32
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 32
    return cfg


def images() -> List[Dict[str, Any]]:
    """Two images with the same boxes, so that both have the same number of positive anchors."""
    inputs = batch(2)
    inputs[1]["instances"] = inputs[0]["instances"]
    return inputs


def one_step(cfg: CfgNode, inputs: List[Dict[str, Any]], loss_normalizer: float) -> nn.Module:
    """The model after a step of SGD."""
    torch.manual_seed(0)
    distiller = build_model(cfg).train()
    distiller.student.loss_normalizer = loss_normalizer
    model = data_parallel(distiller)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with EventStorage():
        sum(model(inputs).values()).backward()
    optimizer.step()
    return model


class CountTeacher(HookBase):
    def __init__(self) -> None:
        self.calls: List[int] = []

    def before_train(self) -> None:
        backbone = self.trainer._module.teacher.model.backbone
        backbone.register_forward_hook(lambda *_: self.calls.append(self.trainer.iter))


class HalfDeadHead(nn.Module):
    """In the main process it teaches nothing, in the others it does."""

    @configurable
    def __init__(self) -> None:
        super().__init__()

    @staticmethod
    def add_config(node: CfgNode) -> None:
        node.LOSS_WEIGHT = 1.0

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair) -> Dict[str, Any]:
        return {}

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Tensor]:
        x = student.features["p3"]
        return {"loss_half_dead": (x.detach() if comm.is_main_process() else x).square().mean()}


def in_each_process(folder: Path, teacher: List[Any]) -> None:
    """All that is done with two processes; what they found is left in files."""
    rank, found = comm.get_rank(), {}
    model = one_step(step_config(teacher), images()[rank : rank + 1], loss_normalizer=100.0)
    found["step"] = model.module.state_dict()
    hidden = {id(p) for p in model.module.teacher.model.parameters()}
    found["teacher_in_ddp"] = sum(id(p) in hidden for p in model.parameters())

    cfg = run_config(folder, teacher, DISTILL__MGD__SCHEDULE__STOP_ITER=4)
    cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.MAX_ITER = 3, 5
    found["dead"] = state_of(interrupt(cfg, 3))
    counter = CountTeacher()
    found["resumed"] = state_of(run(cfg, counter, resume=True))
    found["calls"] = counter.calls
    cfg.OUTPUT_DIR = str(folder / "whole")
    found["whole"] = state_of(run(cfg))

    # The backward of these norms waits for all processes: one that looked alone would hang.
    cfg = run_config(folder, teacher, ["PKD"], OUTPUT_DIR=str(folder / "synchronised"))
    cfg.MODEL.RETINANET.NORM, cfg.SOLVER.IMS_PER_BATCH = "naiveSyncBN", 4
    cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER = (), 3
    watch = next(x for x in run(cfg)._hooks if isinstance(x, Liveness))
    found["looks"] = len(watch.checks["PKD"].measured)

    cfg.SOLVER.IMS_PER_BATCH = 3
    with pytest.raises(ValueError) as info:
        build_trainer(cfg)
    found["error"] = str(info.value)

    # Of 6 classes it can be asked, and knows none of them.
    (folder / f"six_{rank}").mkdir()
    values = {"MODEL__FPN__OUT_CHANNELS": 64, "MODEL__RETINANET__NUM_CLASSES": SHAPES_CLASSES}
    cfg = run_config(folder, write_teacher(folder / f"six_{rank}", "retinanet", **values))
    cfg.DATASETS.TEST, cfg.DISTILL.TEACHER.EVAL_IMAGES = ("d2kd_shapes_val",), 4
    cfg.OUTPUT_DIR = str(folder / "refused")
    went_on = AssertionError("without the other process, for which it would wait for ever")
    with pytest.raises(ValueError) as info, mock.patch.object(
        Trainer, "train", side_effect=went_on
    ):
        train(cfg)
    found["refused"] = str(info.value)
    cfg.DISTILL.TEACHER.EVAL_IMAGES = 0
    with mock.patch.object(comm, "all_gather", side_effect=AssertionError("it waits")):
        check_teacher(cfg, build_teacher(cfg))

    # Last, as one that went on alone would wait for the other.
    DISTILL_HEAD_REGISTRY.register(HalfDeadHead)
    cfg = run_config(folder, teacher, ["HalfDead"], OUTPUT_DIR=str(folder / "half_dead"))
    cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER = (), 3
    with pytest.raises(RuntimeError) as info:
        run(cfg)
    found["error_of_a_head"] = str(info.value)
    torch.save(found, folder / f"rank_{rank}.pth")


def state_of(trainer: Trainer) -> Dict[str, Any]:
    comm.synchronize()  # nobody reads a checkpoint before it is written
    return {
        "start": trainer.start_iter,
        "model": trainer._module.state_dict(),
        "momentum": list(tensors_in(trainer.optimizer.state_dict()["state"])),
        "normalizer": trainer._module.student.loss_normalizer,
    }


def fails_on_the_second(folder: Path) -> None:
    if comm.get_rank() == 1:
        raise FloatingPointError("loss_mgd is not finite")
    comm.synchronize()  # would wait for ever


@pytest.fixture(scope="module")
def ranks(folder: Path, teacher: List[Any]) -> List[Dict[str, Any]]:
    launch_two(in_each_process, folder, teacher)
    return [torch.load(folder / f"rank_{i}.pth") for i in range(2)]


def test_step_of_two_processes_is_that_of_one_with_both_images(
    ranks: List[Dict[str, Any]], teacher: List[Any]
) -> None:
    cfg = step_config(teacher)
    # RetinaNet divides by 0.9 * 100 + 0.1 * positives, and one process has twice the positives.
    expected = one_step(cfg, images(), loss_normalizer=200.0).state_dict()
    torch.manual_seed(0)
    before = build_model(cfg).state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(ranks[0]["step"][key], value, rtol=1e-4, atol=1e-6)
    moved = [k for k, v in expected.items() if not torch.equal(v, before[k])]
    assert {k.split(".")[0] for k in moved} == {"student", "heads"}
    assert_same_tensors(ranks[1]["step"], ranks[0]["step"])


def test_teacher_is_not_in_data_parallel_s_parameters(ranks: List[Dict[str, Any]]) -> None:
    assert [x["teacher_in_ddp"] for x in ranks] == [0, 0]


@pytest.mark.parametrize("when", ["dead", "resumed"])
def test_processes_have_equal_weights_and_momentum_also_after_resume(
    ranks: List[Dict[str, Any]], when: str
) -> None:
    first, second = (x[when] for x in ranks)
    assert_same_tensors(trainable(first["model"]), trainable(second["model"]))
    assert len(first["momentum"]) == len(second["momentum"]) > 50
    assert all(torch.equal(x, y) for x, y in zip(first["momentum"], second["momentum"]))
    assert first["start"] == second["start"] == {"dead": 0, "resumed": 3}[when]


def test_two_processes_resume_exactly(ranks: List[Dict[str, Any]]) -> None:
    for found in ranks:
        resumed, whole = found["resumed"], found["whole"]
        assert_same_tensors(trainable(resumed["model"]), trainable(whole["model"]))
        assert resumed["normalizer"] == whole["normalizer"]
    assert len({x["whole"]["normalizer"] for x in ranks}) == 2  # each process has its own


def test_term_that_has_stopped_is_safe_with_two_processes(ranks: List[Dict[str, Any]]) -> None:
    # MGD alone, stopped from the fifth iteration on: nobody waits for the gradient of its heads.
    assert [x["calls"] for x in ranks] == [[3], [3]]


def test_processes_look_at_gradients_together(ranks: List[Dict[str, Any]]) -> None:
    assert [x["looks"] for x in ranks] == [3, 3]


def test_main_process_s_verdict_stops_all(ranks: List[Dict[str, Any]]) -> None:
    for found in ranks:
        assert (
            "the first 3 steps of HalfDead, loss_half_dead has no gradient"
            in found["error_of_a_head"]
        )


def test_teacher_that_knows_nothing_is_refused_in_each_process(
    ranks: List[Dict[str, Any]], folder: Path
) -> None:
    for found in ranks:
        assert "on 4 images of d2kd_shapes_val it has 0.00 AP, less than" in found["refused"]
    assert not list((folder / "refused").glob("model*"))


def test_batch_size_that_cannot_be_divided_is_refused(ranks: List[Dict[str, Any]]) -> None:
    for found in ranks:
        assert "SOLVER.IMS_PER_BATCH is 3" in found["error"] and "2" in found["error"]


def test_checkpoint_of_two_processes_is_that_of_the_plain_student(
    ranks: List[Dict[str, Any]], folder: Path
) -> None:
    checkpoint = torch.load(folder / "run/model_final.pth", weights_only=True)
    state = ranks[0]["resumed"]["model"]
    student = {k[len("student.") :]: v for k, v in state.items() if k.startswith("student.")}
    assert_same_tensors(checkpoint["model"], student)


def test_error_in_one_process_ends_the_others(folder: Path) -> None:
    with pytest.raises(Exception, match="loss_mgd is not finite"):
        launch(fails_on_the_second, 2, device="cpu", args=(folder,))


def test_user_s_mistake_is_raised_as_in_one_process() -> None:
    with pytest.raises(FileNotFoundError, match="^Config file 'nowhere.yaml' does not exist"):
        launch_two(load_config, "nowhere.yaml")


def wait_for_ever(folder: Path) -> None:
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(3600)


def interrupt_the_first(folder: Path) -> None:
    """The one that has begun the other two, which alone gets the signal."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's "&" has it ignored
    with mock.patch("d2kd.engine.parallel.PATIENCE", 0):
        first = multiprocessing.get_context("fork").Process(
            target=launch_two, args=(wait_for_ever, folder), kwargs={"start_method": "fork"}
        )
        first.start()
    others: List[int] = []
    try:
        while len(others) < 2:
            others = [int(x.stem) for x in folder.glob("*.pid")]
        os.kill(first.pid, signal.SIGINT)
        first.join(120)
        assert first.exitcode == 1, "it waits for the others"
        for pid in others:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
    finally:
        first.kill()
        for pid in others:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_interrupted_run_leaves_no_process_that_trains_on(tmp_path: Path) -> None:
    in_clean_process(interrupt_the_first, tmp_path)


def test_processes_wait_for_each_other_as_long_as_detectron2s() -> None:
    # On GPUs, whose own limit is shorter: the main process computes the AP of a large set alone.
    begin = mock.Mock(side_effect=InterruptedError)
    with mock.patch("torch.distributed.init_process_group", begin):
        with pytest.raises(InterruptedError):
            _worker(0, None, print, 2, 2, 0, "tcp://127.0.0.1:1", "cuda", ())
    assert begin.call_args.kwargs["timeout"] == DEFAULT_TIMEOUT


def note_place(folder: Path) -> None:
    rank = comm.get_rank()
    found = [comm.get_world_size(), comm.get_local_rank(), comm.get_local_size()]
    (folder / str(rank)).write_text(repr([*found, torch.get_num_threads()]))


def one_machine(rank: int, url: str, folder: Path) -> None:
    torch.set_num_threads(4)
    with cheap_processes("fork"):
        launch(note_place, 2, 2, rank, url, "cpu", (folder,))


def test_two_machines_have_four_ranks_and_share_their_cores_among_their_own(tmp_path: Path) -> None:
    url = f"tcp://127.0.0.1:{_free_port()}"
    context = multiprocessing.get_context("forkserver")
    machines = [context.Process(target=one_machine, args=(x, url, tmp_path)) for x in range(2)]
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.join(60)
        machine.kill()
    found = {int(x.name): x.read_text() for x in tmp_path.iterdir()}
    assert found == {rank: repr([4, rank % 2, 2, 2]) for rank in range(4)}


def test_one_process_runs_in_place() -> None:
    called = []
    launch(called.append, 1, args=("here",))
    assert called == ["here"]


@pytest.mark.parametrize(
    "args, words",
    [
        ({"num_processes": 99, "device": "cuda"}, "--num-gpus 99: this machine has"),
        ({"num_processes": 1, "num_machines": 2, "device": "cpu"}, "auto works on one machine"),
    ],
)
def test_processes_that_cannot_begin_are_refused(args: Dict[str, Any], words: str) -> None:
    with mock.patch("d2kd.engine.parallel.mp.start_processes") as start:
        with pytest.raises(ValueError, match=words):
            launch(print, **args)
    assert not start.called


def trainable(state: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """Without BatchNorm's statistics, which every process has of its own images."""
    return {k: v for k, v in state.items() if "running_" not in k and "num_batches" not in k}
