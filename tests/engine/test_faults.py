"""Checkpoints that are damaged, disks without room: nothing is lost that had been saved."""

import errno
import hashlib
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List
from unittest import mock

import pytest
import torch

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import PeriodicWriter

from d2kd.cli import train as train_command
from d2kd.cli.train import main as train_main
from d2kd.engine import Trainer, train
from d2kd.engine.facts import read_lines
from d2kd.utils import atomic_file
from d2kd.utils.atomic_file import atomic_write, check_writable, explain_full_disk
from d2kd.weights.run_checkpoints import last_whole_checkpoint
from d2kd.weights.verify import read_verified
from tests.helpers.forks import fork, in_clean_process
from tests.helpers.runs import assert_same_checkpoint, at, interrupt, run, run_config, saved
from tests.helpers.toys import write_teacher


def resume(cfg: CfgNode) -> None:
    run(cfg, resume=True)


@pytest.fixture(scope="module")
def whole(folder: Path, teacher: List[Any]) -> Dict[str, Any]:
    """The last checkpoint of a run that nothing happened to."""
    cfg = at(run_config(folder, teacher), folder, "whole")
    run(cfg)
    return saved(cfg)


@pytest.fixture(scope="module")
def interrupted(folder: Path, teacher: List[Any]) -> CfgNode:
    """The same, dead in iteration 2 and saved after each one before."""
    cfg = run_config(folder, teacher, SOLVER__CHECKPOINT_PERIOD=1)
    cfg = at(cfg, folder, "interrupted")
    interrupt(cfg, 2)
    return cfg


# Damaged ------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(bytes(data))


def flip_a_byte_of_the_directory(path: Path) -> None:
    """In the flags of the last entry of the zip file's directory, which then seems encrypted."""
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] ^= 0x01
    path.write_bytes(bytes(data))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    "damage", [truncate, flip_a_byte, flip_a_byte_of_the_directory, empty, remove]
)
def test_damaged_last_checkpoint_is_told_and_the_one_before_is_used(
    damage: Callable[[Path], None],
    interrupted: CfgNode,
    whole: Dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    broken = at(interrupted, tmp_path, "broken")
    shutil.copytree(interrupted.OUTPUT_DIR, broken.OUTPUT_DIR)
    last = Path(last_whole_checkpoint(broken.OUTPUT_DIR))
    assert last.name == "model_0000001.pth"
    damage(last)
    run(broken, resume=True)
    assert str(last) in caplog.text and "Going on from" in caplog.text
    assert "model_0000000.pth" in caplog.text
    assert_same_checkpoint(saved(broken), whole)


def test_name_of_the_last_checkpoint_may_be_lost(tmp_path: Path) -> None:
    torch.save({"model": {"x": torch.zeros(3)}}, tmp_path / "model_0000001.pth")
    (tmp_path / "last_checkpoint").write_text("")
    assert last_whole_checkpoint(str(tmp_path)) == str(tmp_path / "model_0000001.pth")


def test_newest_checkpoint_stands_in_for_the_last_one_whatever_its_name(tmp_path: Path) -> None:
    """Of an earlier and longer run in this folder there may be some with larger numbers."""
    for seconds, name in enumerate(("model_0000009", "model_0000003", "model_0000001")):
        torch.save({"model": {"x": torch.zeros(3)}}, tmp_path / f"{name}.pth")
        os.utime(tmp_path / f"{name}.pth", (seconds, seconds))
    (tmp_path / "last_checkpoint").write_text("model_0000005.pth")  # which is gone
    assert last_whole_checkpoint(str(tmp_path)) == str(tmp_path / "model_0000001.pth")
    truncate(tmp_path / "model_0000001.pth")
    assert last_whole_checkpoint(str(tmp_path)) == str(tmp_path / "model_0000003.pth")


def test_no_whole_checkpoint_stops_the_run_with_all_their_names(
    interrupted: CfgNode, tmp_path: Path
) -> None:
    cfg = at(interrupted, tmp_path, "run")
    shutil.copytree(interrupted.OUTPUT_DIR, cfg.OUTPUT_DIR)
    for path in Path(cfg.OUTPUT_DIR).glob("model_*.pth"):
        truncate(path)
    with pytest.raises(ValueError, match="(?s)model_0000001.pth .*model_0000000.pth"):
        train(cfg, resume=True)


def test_damaged_best_checkpoint_does_not_stop_a_run(
    folder: Path, teacher: List[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = run_config(folder, teacher, SOLVER__CHECKPOINT_PERIOD=1, TEST__EVAL_PERIOD=1)
    cfg.DATASETS.TEST = ("d2kd_shapes_val",)
    cfg = at(cfg, tmp_path, "run")
    interrupt(cfg, 2)
    best = Path(cfg.OUTPUT_DIR, "model_best.pth")
    best.write_bytes(b"half of it")
    run(cfg, resume=True)
    assert f"{best} cannot be read" in caplog.text
    assert Path(cfg.OUTPUT_DIR, "model_final.pth").exists()


def test_half_a_line_of_metrics_costs_the_resumed_run_none(folder: Path, tmp_path: Path) -> None:
    """As a full disk leaves it."""
    cfg = at(run_config(folder), tmp_path, "run")
    interrupt(cfg, 2)
    path = Path(cfg.OUTPUT_DIR, "metrics.json")
    with open(path, "a") as file:
        file.write('{"iteration": 2, "total_l')
    train(cfg, resume=True)
    assert read_lines(str(path))[-1]["iteration"] == 3, "the only line that it writes"


def test_damage_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"x": torch.arange(1000)}, path)
    read_verified(str(path))
    flip_a_byte(path)
    with pytest.raises(ValueError, match="corrupt"):
        read_verified(str(path))
    torch.save({"x": torch.arange(1000)}, path)
    flip_a_byte_of_the_directory(path)
    with pytest.raises(ValueError, match="encrypted"):
        read_verified(str(path))
    with pytest.raises(ValueError, match="^there is no such file$"):
        read_verified(str(tmp_path / "none.pth"))


# An image with a NaN ------------------------------------------------------------------------------


class NaNImage(HookBase):
    """The data loader gives a NaN in one of the images, the first of a batch."""

    def __init__(self, iteration: int):
        self.iteration = iteration
        self.file_name = ""

    def before_train(self) -> None:
        dataset = self.trainer.data_loader.dataset
        load = dataset.mapper

        def load_or_spoil(image: Dict[str, Any]) -> Dict[str, Any]:
            sample = load(image)
            if self.trainer.iter == self.iteration and not self.file_name:
                self.file_name = sample["file_name"]
                sample["image"] = sample["image"].float()
                sample["image"][1, 2, 3] = float("nan")
            return sample

        dataset.mapper = load_or_spoil


@pytest.mark.parametrize("student", ["retinanet", "faster_rcnn"])
def test_nan_in_an_image_stops_the_run_with_its_name_and_it_goes_on_without(
    student: str, folder: Path, teacher: List[Any], tmp_path: Path
) -> None:
    # A RetinaNet has losses then, of a Faster R-CNN the RPN stops before there are any.
    cfg = run_config(folder, teacher, ["MGD", "PKD"], student)
    stopped, whole = at(cfg, tmp_path, "stopped"), at(cfg, tmp_path, "whole")
    spoil = NaNImage(3)
    with pytest.raises(FloatingPointError) as info:
        run(stopped, spoil)
    message = str(info.value)
    assert f"{spoil.file_name} (which has 1 values that are not finite)" in message
    assert message.count("(which has") == 1, "the other image is whole"
    for side in ("student", "teacher"):
        assert f"the {side}'s features at p3 have" in message
    assert [x.name for x in Path(stopped.OUTPUT_DIR).glob("*model*")] == ["model_0000001.pth"]
    resume(stopped)
    run(whole)
    assert_same_checkpoint(saved(stopped), saved(whole))


class SpoilStep(HookBase):
    """As the gradient of a finite loss may: a weight is NaN after the step of iteration 3."""

    def __init__(self, part: str):
        self.part = part

    def before_step(self) -> None:
        if self.trainer.iter == 3:
            module = getattr(self.trainer._module, self.part)
            next(module.parameters()).register_hook(lambda gradient: gradient * float("nan"))


@pytest.mark.parametrize("part", ["student", "heads"])
def test_weights_that_are_not_finite_are_not_saved(
    part: str, folder: Path, teacher: List[Any], tmp_path: Path
) -> None:
    cfg = at(run_config(folder, teacher), tmp_path, "run")
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    with pytest.raises(FloatingPointError, match="model_0000003.pth was not saved: .* not finite"):
        run(cfg, SpoilStep(part))
    assert [x.name for x in Path(cfg.OUTPUT_DIR).glob("model*")] == ["model_0000001.pth"]
    whole = at(cfg, tmp_path, "whole")
    run(whole)
    run(cfg, resume=True)
    assert_same_checkpoint(saved(cfg), saved(whole))


# Another teacher ----------------------------------------------------------------------------------


def test_teacher_swapped_while_the_run_is_down_is_refused_with_both_hashes(
    folder: Path, tmp_path: Path
) -> None:
    opts = write_teacher(tmp_path, "retinanet", MODEL__FPN__OUT_CHANNELS=64)
    cfg = at(run_config(folder, opts), tmp_path, "run")
    interrupt(cfg, 2)
    right, file = sha256(opts[3]), Path(opts[3])
    kept = file.read_bytes()
    write_teacher(tmp_path, "retinanet", seed=8, MODEL__FPN__OUT_CHANNELS=64)
    with pytest.raises(ValueError, match=f"weights_sha256(?s:.*){right}(?s:.*){sha256(opts[3])}"):
        train(cfg, resume=True)
    file.write_bytes(kept)
    run(cfg, resume=True)
    assert saved(cfg)["teacher"]["weights_sha256"] == right


def sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# No room ------------------------------------------------------------------------------------------


def limit_files(rank: int, cfg: CfgNode) -> None:
    """Files may not grow beyond 100 kB, which no checkpoint of this run keeps to."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    message = "model_0000003.pth could not be written: .*File too large.*--resume"
    with pytest.raises(OSError, match=message):
        run(cfg, resume=True)


@pytest.mark.process
def test_disk_without_room_is_told_and_what_was_saved_is_kept(
    folder: Path, teacher: List[Any], whole: Dict[str, Any], tmp_path: Path
) -> None:
    full = at(run_config(folder, teacher), tmp_path, "full")
    interrupt(full, 2)
    torch.multiprocessing.start_processes(limit_files, (full,), start_method="forkserver")
    files = sorted(x.name for x in Path(full.OUTPUT_DIR).glob("*model*"))
    assert files == ["model_0000001.pth"], "neither a half one nor one that is left over"
    run(full, resume=True)  # there is room again
    assert_same_checkpoint(saved(full), whole)


def checkpoint_size(cfg: CfgNode, folder: Path) -> int:
    """In bytes, with all that the optimizer keeps."""
    cfg = at(cfg, folder, "measured")
    cfg.SOLVER.MAX_ITER = 1
    run(cfg)
    return Path(cfg.OUTPUT_DIR, "model_final.pth").stat().st_size


@pytest.fixture
def full(folder: Path, teacher: List[Any], tmp_path: Path) -> Iterator[CfgNode]:
    """A run whose OUTPUT_DIR is a file system with room for one checkpoint and not for two."""
    cfg = at(run_config(folder, teacher, SOLVER__MAX_ITER=6), tmp_path, "disk")
    room = checkpoint_size(cfg, tmp_path) * 3 // 2
    Path(cfg.OUTPUT_DIR).mkdir()
    try:
        mount("-t", "tmpfs", "-o", f"size={room}", "tmpfs", cfg.OUTPUT_DIR)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"a tmpfs cannot be mounted here: {getattr(error, 'stderr', error)}")
    yield cfg
    subprocess.run(["umount", cfg.OUTPUT_DIR], check=True)


def mount(*args: str) -> None:
    subprocess.run(["mount", *args], check=True, capture_output=True, text=True)


class Fill(HookBase):
    """Somebody else takes what is left of the disk, to the last byte."""

    def __init__(self, iteration: int):
        self.iteration = iteration

    def after_step(self) -> None:
        if self.trainer.iter != self.iteration:
            return
        with open(Path(self.trainer.cfg.OUTPUT_DIR, "junk"), "wb", buffering=0) as file:
            with pytest.raises(OSError, match="No space left"):
                while True:
                    file.write(bytes(1 << 12))


class WriteEachStep(HookBase):
    """
    Into metrics.json, to which else nothing is added in so few steps, and more than may still have
    a place in its last block.
    """

    def before_train(self) -> None:
        (writer,) = [x for x in self.trainer._hooks if isinstance(x, PeriodicWriter)]
        writer._period = 1

    def after_step(self) -> None:
        for i in range(500):
            self.trainer.storage.put_scalar(f"number_{i}", i)


def stops(match: str, cfg: CfgNode, *hooks: HookBase, resume: bool = True) -> None:
    build_hooks = Trainer.build_hooks
    Trainer.build_hooks = lambda self: [*hooks, *build_hooks(self)]
    with pytest.raises(OSError, match=match):
        train(cfg, resume=resume)


def resume_by_command(cfg: CfgNode, config_file: str) -> None:
    with pytest.raises(OSError, match=f"^OUTPUT_DIR: '{cfg.OUTPUT_DIR}' is not writable"):
        train_main(["--config-file", config_file, "--resume"])


def fill_and_resume(cfg: CfgNode, whole: CfgNode, config_file: str) -> None:
    disk = Path(cfg.OUTPUT_DIR)

    def check_left(*last: str) -> None:
        assert sorted(x.name for x in disk.glob("*model*")) == sorted(last)
        assert last_whole_checkpoint(str(disk)) == str(disk / last[-1])
        Path(disk / "junk").unlink(missing_ok=True)

    # Full of its own checkpoints.
    checkpoint = "(?s)model_0000003.pth could not be written: .*No space left.*--resume"
    assert fork(stops, checkpoint, cfg) == 0
    check_left("model_0000001.pth")
    # The disk fails and is mounted read-only, as systems do.
    mount("-o", "remount,ro", str(disk))
    assert fork(resume_by_command, cfg, config_file) == 0
    room = 6 * Path(disk, "model_0000001.pth").stat().st_size
    mount("-o", f"remount,rw,size={room}", str(disk))
    check_left("model_0000001.pth")
    # Not a byte is left, for the log of the error neither.
    assert fork(stops, checkpoint, cfg, WriteEachStep(), Fill(3)) == 0
    check_left("model_0000001.pth")
    # It is full where nothing but the log is written.
    log = f"^OUTPUT_DIR: cannot write to '{disk}': .*No space left.*--resume"
    assert fork(stops, log, cfg, WriteEachStep(), Fill(4)) == 0
    check_left("model_0000001.pth", "model_0000003.pth")
    assert fork(resume, cfg) == fork(resume, whole) == 0


@pytest.mark.process
def test_full_or_read_only_disk_stops_the_run_and_it_goes_on_when_there_is_room(
    full: CfgNode, tmp_path: Path
) -> None:
    whole = at(full, tmp_path, "whole")
    config_file = tmp_path / "run.yaml"
    config_file.write_text(full.dump())
    in_clean_process(fill_and_resume, full, whole, str(config_file))
    assert_same_checkpoint(saved(full), saved(whole))


def no_room(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("full_before", [True, False])
def test_config_of_a_run_is_kept_where_its_disk_is_full_when_it_is_resumed(
    full_before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(cfg: CfgNode, args: Any) -> None:
        Path(cfg.OUTPUT_DIR, "config.yaml").write_text("half of anoth")
        monkeypatch.setattr(atomic_file.os, "fsync", no_room)
        no_room()

    cfg = run_config(tmp_path, OUTPUT_DIR=str(tmp_path))
    (tmp_path / "config.yaml").write_text("the run's")
    monkeypatch.setattr(train_command, "default_setup", write)
    if full_before:
        monkeypatch.setattr(atomic_file.os, "fsync", no_room)
    with pytest.raises(OSError, match=f"'?{tmp_path}.*No space left"):
        train_command.prepare_output(cfg, train_command.parse_args(["--resume"]))
    assert (tmp_path / "config.yaml").read_text() == "the run's"
    assert not list(tmp_path.glob("config.yaml?*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every folder")
def test_output_folder_without_permission_is_told_by_its_key(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(OSError, match="OUTPUT_DIR: .*Permission denied"):
        check_writable(str(tmp_path))


def test_full_disk_is_told_by_its_key_and_other_errors_are_left_as_they_are() -> None:
    with pytest.raises(OSError, match="^OUTPUT_DIR: cannot write to 'run': .*No space"):
        with explain_full_disk("run"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for error in (OSError(errno.ENOSPC, "full", "a.json"), OSError(errno.ECONNRESET, "reset")):
        with pytest.raises(OSError) as info:
            with explain_full_disk("run"):
                raise error
        assert info.value is error


class FailTwice(HookBase):
    def after_step(self) -> None:
        raise ValueError("the reason")

    def after_train(self) -> None:
        raise ValueError("what came of it")


def test_what_fails_after_an_error_does_not_hide_it(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = at(run_config(folder), tmp_path, "run")
    with pytest.raises(ValueError, match="the reason"):
        run(cfg, FailTwice())
    assert "what came of it" in caplog.text
    with mock.patch.object(FailTwice, "after_step"):
        with pytest.raises(ValueError, match="what came of it"):
            run(cfg, FailTwice())


def test_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "last_checkpoint"
    path.write_text("model_0000001.pth")
    with pytest.raises(OSError, match="last_checkpoint could not be written: .*No space left"):
        with atomic_write(str(path), "w") as file:
            file.write("model_")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == "model_0000001.pth" and os.listdir(tmp_path) == [path.name]


def test_output_folder_that_cannot_be_made_is_told_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="OUTPUT_DIR: '.*file/run' is not writable"):
        check_writable(str(tmp_path / "file" / "run"))
    check_writable(str(tmp_path / "new" / "run"))
    assert os.listdir(tmp_path / "new" / "run") == []


def test_error_that_has_nothing_to_do_with_the_disk_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="^device-side assert$"):
        with atomic_write(str(tmp_path / "model.pth")):
            raise RuntimeError("device-side assert")
    assert os.listdir(tmp_path) == []


class FailAt(HookBase):
    def __init__(self, iteration: int):
        self.iteration = iteration

    def after_step(self) -> None:
        if self.trainer.iter == self.iteration:
            raise ValueError("the reason")


@pytest.mark.parametrize("before_the_end", [1, 2])
def test_run_that_fails_is_not_evaluated_in_its_last_iteration_either(
    before_the_end: int, folder: Path, tmp_path: Path
) -> None:
    cfg = at(run_config(folder, DATASETS__TEST=("d2kd_shapes_val",)), tmp_path, "run")
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    with pytest.raises(ValueError, match="the reason"):
        run(cfg, FailAt(cfg.SOLVER.MAX_ITER - before_the_end))
    assert not Path(cfg.OUTPUT_DIR, "inference").exists()
    assert not Path(cfg.OUTPUT_DIR, "model_best.pth").exists()
