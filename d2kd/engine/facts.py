"""What a run finds out about itself, one JSON a line, beside Detectron2's metrics.json."""

import json
import os
from datetime import datetime
from typing import Any, Dict, List

from detectron2.utils import comm

FILE = "facts.jsonl"


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
    os.makedirs(folder, exist_ok=True)
    time = datetime.now().astimezone().isoformat(timespec="seconds")
    with open(os.path.join(folder, FILE), "a") as file:
        file.write(json.dumps({"kind": kind, "time": time, **values}) + "\n")


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
