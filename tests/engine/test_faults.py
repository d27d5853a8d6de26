"""Runs that are killed, and checkpoints that are damaged: nothing is lost that had been saved."""

import errno
import io
import os
import resource
import signal
from pathlib import Path
from typing import Any, Callable, List

import pytest
import torch

from detectron2.config import CfgNode
from detectron2.engine import HookBase

from d2kd.checkpoint import PlainCheckpointer
from d2kd.engine import launch, train
from d2kd.whole_files import check_writable, damage_of, last_whole_checkpoint, write_whole

from runs import assert_same_tensors, interrupt, run, run_config, tensors_in


def at(cfg: CfgNode, folder: Path, name: str) -> CfgNode:
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = str(folder / name)
    return cfg


def final(cfg: CfgNode) -> Any:
    return torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)


def assert_same_end(cfg: CfgNode, other: CfgNode) -> None:
    """Student, heads and optimizer are equal to the bit."""
    ours, theirs = final(cfg), final(other)
    for part in ("model", "distill_heads"):
        assert_same_tensors(ours[part], theirs[part])
    optimizers = [list(tensors_in(x["trainer"]["_trainer"]["optimizer"])) for x in (ours, theirs)]
    assert all(torch.equal(a, b) for a, b in zip(*optimizers)) and optimizers[0]


# Killed -------------------------------------------------------------------------------------------


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class KillInStep(HookBase):
    def after_step(self) -> None:
        if self.trainer.iter == 2:
            kill()


def kill_while_saving(iteration: int = 3) -> None:
    """The process dies when half of the checkpoint of the fourth iteration is on the disk."""
    save = torch.save

    def half(data: Any, file: Any) -> None:
        whole = io.BytesIO()
        save(data, whole)
        if data.get("iteration") != iteration:
            file.write(whole.getvalue())
            return
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        kill()

    torch.save = half


def kill_before_naming(iteration: int = 3) -> None:
    """The process dies when a checkpoint is written, but not yet named as the last."""
    tag = PlainCheckpointer.tag_last_checkpoint

    def no_tag(self: PlainCheckpointer, name: str) -> None:
        if name.endswith(f"{iteration}.pth"):
            kill()
        tag(self, name)

    PlainCheckpointer.tag_last_checkpoint = no_tag


def train_and_die(cfg: CfgNode, point: str) -> None:
    if point == "in a step":
        run(cfg, KillInStep())
    (kill_while_saving if point == "while saving" else kill_before_naming)()
    run(cfg)


def spawned(rank: int, cfg: CfgNode, point: str) -> None:
    train_and_die(cfg, point)


POINTS = ("in a step", "while saving", "before naming")


def test_killed_run_resumes_to_the_same_end(
    folder: Path, teacher: List[Any], tmp_path: Path
) -> None:
    cfg = run_config(folder, teacher, SOLVER__MAX_ITER=6)
    whole, killed = at(cfg, tmp_path, "whole"), [at(cfg, tmp_path, point) for point in POINTS]
    for point, part in zip(POINTS, killed):
        with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
            torch.multiprocessing.start_processes(spawned, (part, point), start_method="spawn")
        assert not Path(part.OUTPUT_DIR, "model_final.pth").exists()
        assert last_whole_checkpoint(part.OUTPUT_DIR).endswith("model_0000001.pth")
    # Not in this process, for which other tests have already compiled TorchScript's functions.
    torch.multiprocessing.start_processes(finish, (whole, killed), start_method="spawn")
    for part in killed:
        assert_same_end(part, whole)
        assert not list(Path(part.OUTPUT_DIR).glob("*.unfinished"))


def finish(rank: int, whole: CfgNode, killed: List[CfgNode]) -> None:
    run(whole)
    for part in killed:
        run(part, resume=True)


def test_two_processes_that_are_killed_resume_to_the_same_end(
    folder: Path, teacher: List[Any], tmp_path: Path
) -> None:
    cfg = run_config(folder, teacher, SOLVER__MAX_ITER=4)
    whole, killed = at(cfg, tmp_path, "whole"), at(cfg, tmp_path, "killed")
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        launch(train_and_die, 2, device="cpu", args=(killed, "while saving"))
    launch(begin_and_go_on, 2, device="cpu", args=(whole, killed))
    assert_same_end(killed, whole)


def begin_and_go_on(whole: CfgNode, killed: CfgNode) -> None:
    run(whole)
    run(killed, resume=True)


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
    folder: Path,
    teacher: List[Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cfg = run_config(folder, teacher, SOLVER__CHECKPOINT_PERIOD=1)
    whole, broken = at(cfg, tmp_path, "whole"), at(cfg, tmp_path, "broken")
    interrupt(broken, 2)
    last = Path(last_whole_checkpoint(broken.OUTPUT_DIR))
    assert last.name == "model_0000001.pth"
    damage(last)
    run(broken, resume=True)
    assert str(last) in caplog.text and "Going on from" in caplog.text
    assert "model_0000000.pth" in caplog.text
    run(whole)
    assert_same_end(broken, whole)


def test_name_of_the_last_checkpoint_may_be_lost(tmp_path: Path) -> None:
    torch.save({"model": {"x": torch.zeros(3)}}, tmp_path / "model_0000001.pth")
    (tmp_path / "last_checkpoint").write_text("")
    assert last_whole_checkpoint(str(tmp_path)) == str(tmp_path / "model_0000001.pth")


def test_no_whole_checkpoint_stops_the_run_with_all_their_names(
    folder: Path, teacher: List[Any], tmp_path: Path
) -> None:
    cfg = at(run_config(folder, teacher, SOLVER__CHECKPOINT_PERIOD=1), tmp_path, "run")
    interrupt(cfg, 2)
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
    assert f"{best} is damaged" in caplog.text
    assert Path(cfg.OUTPUT_DIR, "model_final.pth").exists()


def test_damage_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save({"x": torch.arange(1000)}, path)
    assert damage_of(str(path)) == ""
    flip_a_byte(path)
    assert "corrupt" in damage_of(str(path))
    torch.save({"x": torch.arange(1000)}, path)
    flip_a_byte_of_the_directory(path)
    assert damage_of(str(path))
    assert damage_of(str(tmp_path / "none.pth")) == "there is no such file"


# No room ------------------------------------------------------------------------------------------


def limit_files(rank: int, cfg: CfgNode) -> None:
    """Files may not grow beyond 100 kB, which no checkpoint of this run keeps to."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    with pytest.raises(OSError, match="(?s)model_0000003.pth could not be written.*--resume"):
        run(cfg, resume=True)


def test_disk_without_room_is_told_and_what_was_saved_is_kept(
    folder: Path, teacher: List[Any], tmp_path: Path
) -> None:
    cfg = run_config(folder, teacher)
    whole, full = at(cfg, tmp_path, "whole"), at(cfg, tmp_path, "full")
    interrupt(full, 2)
    torch.multiprocessing.start_processes(limit_files, (full,), start_method="spawn")
    files = sorted(x.name for x in Path(full.OUTPUT_DIR).glob("*model*"))
    assert files == ["model_0000001.pth"], "neither a half one nor one that is left over"
    run(full, resume=True)  # there is room again
    run(whole)
    assert_same_end(full, whole)


def test_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "last_checkpoint"
    path.write_text("model_0000001.pth")
    with pytest.raises(OSError, match="last_checkpoint could not be written: .*No space left"):
        with write_whole(str(path), "w") as file:
            file.write("model_")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == "model_0000001.pth" and os.listdir(tmp_path) == [path.name]


def test_output_folder_that_cannot_be_made_is_told_by_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="OUTPUT_DIR: nothing can be written to '.*file/run'"):
        check_writable(str(tmp_path / "file" / "run"))
    check_writable(str(tmp_path / "new" / "run"))
    assert os.listdir(tmp_path / "new" / "run") == []


def test_error_that_has_nothing_to_do_with_the_disk_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="^device-side assert$"):
        with write_whole(str(tmp_path / "model.pth")):
            raise RuntimeError("device-side assert")
    assert os.listdir(tmp_path) == []
