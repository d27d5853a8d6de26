"""One cell of tools/bench.py, from train_net.py to a row of the CSV."""

import json
import os
import shlex
import subprocess
import sys
import threading
from typing import IO, Any, Dict, List, Optional, Set

from bench_cells import Cell, Table
from bench_progress import training_seconds
from bench_results import Row, provenance
from d2kd.utils.atomic_file import write_json
from quickstart import ROOT, evaluation

TRAIN_NET = os.path.join(ROOT, "train_net.py")


class StepFailed(Exception):
    """train_net.py stopped with an error; the text is the end of what it said."""


class Children:
    """The train_net.py processes of a bench, which end with it."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._running: Set[subprocess.Popen] = set()

    def run(self, words: List[str], said: str, lock: IO) -> int:
        """
        Args:
            said: file that receives what it prints
            lock: it has this too, so that the cell stays locked where the bench alone is killed

        Returns:
            exit code
        """
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with open(said, "w") as file:
            child = subprocess.Popen(
                [sys.executable, TRAIN_NET, *words],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=one_thread,
                pass_fds=(lock.fileno(),),
            )
        self._running.add(child)
        if self.stopped.is_set():
            child.terminate()
        code = child.wait()
        self._running.discard(child)
        return code

    def stop(self) -> None:
        self.stopped.set()
        for child in list(self._running):
            child.terminate()


def run_cell(table: Table, cell: Cell, lock: IO, children: Children) -> Row:
    """
    Train from where it stopped, evaluate the end on the table's test set.

    Args:
        lock: file that is locked as long as somebody runs this cell

    Raises:
        StepFailed: train_net.py did
    """
    folder = table.folder(cell)
    how = _begin(folder, cell, table)
    words = [*cell.source, "--resume", *cell.words, "OUTPUT_DIR", folder]
    parts = {"val": _step("val", words, folder, lock, children)}
    if table.test:
        words = [*cell.source, "--eval-only", *cell.words, "DATASETS.TEST", repr((table.test,))]
        words += ["OUTPUT_DIR", f"{folder}/test", "MODEL.WEIGHTS", f"{folder}/model_final.pth"]
        parts["test"] = _step("test", words, folder, lock, children)
    scores = {
        f"{part}_{k}".replace(" ", "_"): v
        for part, found in parts.items()
        for k, v in found.items()
    }
    return {
        **{k: str(getattr(cell, k)) for k in ("row", "config", "seed", "iterations")},
        "opts": " ".join(cell.opts),
        **{k: f"{v:.3f}" for k, v in scores.items()},
        "seconds": f"{training_seconds(folder, cell.iterations):.0f}",
        **how,
        "command": shlex.join(["python", "train_net.py", *cell.source, *cell.words]),
        "key": cell.key,
        "recipe": cell.recipe,
    }


def _begin(folder: str, cell: Cell, table: Table) -> Row:
    """Versions and hardware; of a run that goes on with other code, both commits."""
    path = os.path.join(folder, "begun.json")
    how = provenance(cell.cfg.MODEL.DEVICE, table.results)
    before = _load(path) or how
    if how["commit"] not in before["commit"].split():
        how["commit"] = f"{before['commit']} {how['commit']}"
    if before["dirty"] != "no":
        how["dirty"] = before["dirty"]
    write_json(path, how)
    return how


def _step(
    name: str, words: List[str], folder: str, lock: IO, children: Children
) -> Dict[str, float]:
    """
    train_net.py, unless it was done before.

    Returns:
        metric to value, in percent
    """
    done, said = os.path.join(folder, f"{name}.json"), os.path.join(folder, f"{name}.txt")
    if not os.path.isfile(done):
        code = children.run(words, said, lock)
        with open(said) as file:
            lines = file.read().splitlines()
        if code or not any("copypaste: Task: bbox" in x for x in lines):
            end = "All that it said" if code else "There is no evaluation of boxes in what it said"
            raise StepFailed("\n".join([*lines[-15:], f"{end}: {said}"]))
        write_json(done, evaluation(lines))
    return _load(done)


def _load(path: str) -> Optional[Any]:
    """None: no such file"""
    if not os.path.isfile(path):
        return None
    with open(path) as file:
        return json.load(file)
