"""What tools/bench.py keeps of each finished run: a row of a CSV, and how it came about."""

import csv
import fcntl
import io
import os
import subprocess
import time
from typing import Dict, Iterable, List, Sequence, Tuple

import torch

import detectron2

from d2kd import __version__
from quickstart import MASK_AP, METRICS, ROOT

# The AP of masks is empty where a detector has none.
SCORES = tuple(
    f"{part}_{x}".replace(" ", "_") for part in ("val", "test") for x in (*METRICS, MASK_AP)
)
COLUMNS = ("row", "config", "opts", "seed", "iterations", *SCORES, "seconds")
COLUMNS += ("commit", "dirty", "d2kd", "detectron2", "torch", "hardware", "date", "command")
COLUMNS += ("key", "recipe")

Row = Dict[str, str]
Group = Dict[int, Row]  # by seed


def read_results(path: str, columns: Sequence[str] = COLUMNS) -> List[Row]:
    """
    Raises:
        ValueError: a file of other columns
    """
    if not os.path.isfile(path):
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        found = reader.fieldnames or columns  # none yet: the first row is about to be written
        rows = list(reader)
    if tuple(found) != tuple(columns):
        raise ValueError(f"{path} has the columns {found}, not {list(columns)}.")
    return rows


def groups(results: Sequence[Row]) -> Dict[Tuple[str, int], Group]:
    """
    Seeds of one row and budget. Where a row was run again with another config, the last one counts:
    figures of two recipes make no mean.
    """
    found: Dict[Tuple[str, int], Group] = {}
    for x in results:
        place = (x["row"], int(x["iterations"]))
        if any(other["recipe"] != x["recipe"] for other in found.get(place, {}).values()):
            found[place] = {}
        found.setdefault(place, {})[int(x["seed"])] = x
    return found


def in_order(found: Iterable[Tuple[str, int]], rows: Sequence[str]) -> List[Tuple[str, int]]:
    """Row and budget of those of these rows, in the rows' order, then by budget."""
    return sorted((x for x in found if x[0] in rows), key=lambda x: (rows.index(x[0]), x[1]))


def append_result(path: str, row: Row, columns: Sequence[str] = COLUMNS) -> None:
    """Add a row, in one piece also where several benches write at a time."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "a", newline="") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
        file.write(text.getvalue())
        file.flush()
        os.fsync(file.fileno())


def provenance(device: str, results: str) -> Row:
    """
    What a figure depends on beside its config.

    Args:
        device: MODEL.DEVICE
        results: the CSV; new rows of it, or of one beside it, do not make the code another one
    """
    commit = _git("rev-parse", "--short=10", "HEAD")
    figures = os.path.join(os.path.dirname(os.path.abspath(results)), "*.csv")
    ours = os.path.relpath(figures, ROOT)
    besides = [] if ours.startswith("..") else [f":(exclude,glob){ours}"]
    changes = _git("status", "--porcelain", "-uno", "--", ".", *besides)
    return {
        "commit": commit or "unknown",
        "dirty": ("yes" if changes else "no") if commit else "unknown",
        "d2kd": __version__,
        "detectron2": detectron2.__version__,
        "torch": str(torch.__version__),
        "hardware": _hardware(device),
        "date": time.strftime("%Y-%m-%d"),
    }


def _git(*words: str) -> str:
    """Output of git; "" where there is none."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _hardware(device: str) -> str:
    """With the model of a CPU, as its name may be that of several whose kernels round otherwise."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    said = {}
    with open("/proc/cpuinfo") as file:
        for line in file:
            key, _, value = line.partition(":")
            said.setdefault(key.strip(), value.strip())
    name = said.get("model name", "CPU")
    model = f"family {said.get('cpu family', '?')} model {said.get('model', '?')}"
    return f"{name} {model}, 1 thread"
