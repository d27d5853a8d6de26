"""What a run finds out about itself, one JSON a line, beside Detectron2's metrics.json."""

import json
import os
from datetime import datetime
from typing import Any, Dict, List, Sequence

from detectron2.utils import comm

FILE = "facts.jsonl"

_held: Dict[str, List[str]] = {}  # by folder, lines of a run that has not begun


def hold_facts(folder: str) -> None:
    """
    Keep what is written from now on until :func:`release_facts`: a run that is refused before its
    first step leaves the facts of the run before as they are.
    """
    _held[folder] = []


def release_facts(folder: str) -> None:
    _append(folder, _held.pop(folder, []))


def write_fact(folder: str, kind: str, **values: Any) -> None:
    """
    Append a fact, in the main process.

    Args:
        folder: OUTPUT_DIR
        kind: "command" begins a run or resumes it, "environment", "distillation" what was built,
            "teacher_ap", "gradients" of the monitor
        values: plain ones
    """
    if not comm.is_main_process():
        return
    time = datetime.now().astimezone().isoformat(timespec="seconds")
    line = json.dumps({"kind": kind, "time": time, **values})
    if folder in _held:
        _held[folder].append(line)
    else:
        _append(folder, [line])


def _append(folder: str, lines: Sequence[str]) -> None:
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, FILE)
    end_half_line(path)
    with open(path, "ab") as file:
        file.write("".join(f"{x}\n" for x in lines).encode())


def end_half_line(path: str) -> None:
    """Let what is appended next begin a line, also where a full disk or a kill cut off the last."""
    if not os.path.isfile(path):
        return
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def read_facts(folder: str) -> List[Dict[str, Any]]:
    """Facts of the latest run in a folder and of what it resumed, oldest first."""
    facts: List[Dict[str, Any]] = []
    for fact in read_lines(os.path.join(folder, FILE)):
        if fact["kind"] == "command" and not fact["resume"]:
            facts = []
        facts.append(fact)
    return facts


def read_lines(path: str) -> List[Dict[str, Any]]:
    """JSON by lines, without the part of one that a killed process left; [] if there is no file."""
    if not os.path.isfile(path):
        return []
    found = []
    with open(path) as file:
        for line in file:
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found
