#!/usr/bin/env python
"""Check d2kd on a GPU in a few minutes: does it run, is it right, what does it cost."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Callable, Dict, List, Optional, Sequence

import torch

import detectron2

from d2kd.cli.common import command_parser
from d2kd.engine.metrics import Metrics
from d2kd.utils.user_mistakes import run_command

ROOT = Path(__file__).resolve().parents[1]
GUIDE = """
Parts, in this order, each a process of its own that may take 0.4 of the minutes; one that fails or
is out of time does not stop the others:
  tests             pytest tests/gpu: every head between every pair of small detectors, float32
                    against the CPU and mixed precision; whole runs, evaluation, doctor
  cost, PAIR        tools/benchmark.py, full-size models, two images of 800x1344: ms a step of the
                    plain student and with each head; then the same with AMP
  teacher, PAIR     the same step with each option of DISTILL.TEACHER
  memory, PAIR      GiB of each, in a process for every head
  training          the quickstart's PKD for 300 iterations, then with AMP: s an iteration, AP
After each part its rows are printed, and all rows so far are written as JSON. The output of a part
is in OUTPUT, in a log of its own.

examples:
  python tools/gpu_check.py --minutes 12 --output output/gpu_check
  python tools/gpu_check.py --only tests
  at tiny size on the CPU, where nothing is measured:
    python tools/gpu_check.py --rehearse
"""
DENSE, REGIONS = "retinanet_R_101-R_50", "faster_rcnn_R_101-R_18"
HEADS = {
    DENSE: "PKD MGD CWD FGD AMD DMKD DFMSD SAMKD MLD MAR ReviewKD DIST BCKD CrossKD SGFI CKD",
    REGIONS: "PKD MGD CWD FGD SGFI CKD RoIFI RoICls RoILoc DKD DIST MLD ReviewKD MAR",
}
TEACHERS = "FOLD_NORMS CHANNELS_LAST float16 bfloat16 FOLD_NORMS+CHANNELS_LAST+float16 COMPILE"

Rows = List[Dict[str, Any]]


@dataclass
class Part:
    """
    `words`: what Python is started with; `read`: its output -> rows; `env`: more of the
    environment; `file`: beside its output what `read` reads, if anything. Once it has run, `state`
    is "ok", "failed" or "out of time".
    """

    name: str
    words: List[str]
    read: Callable[[str], Rows]
    env: Dict[str, str] = field(default_factory=dict)
    file: Optional[Path] = None
    state: str = ""
    seconds: float = 0.0
    rows: Rows = field(default_factory=list)

    @property
    def log(self) -> str:
        """Name of the file with its output."""
        return f"{_file_name(self.name)}.log"


def _file_name(part: str) -> str:
    return part.replace(", ", "-").replace(" ", "-")


def parts_of(output: Path, rehearse: bool) -> List[Part]:
    """All parts in their order; in a rehearsal tiny, and without what the CPU lacks."""
    modes = [""] if rehearse else ["", "--amp"]
    pairs = [DENSE] if rehearse else [DENSE, REGIONS]
    parts = [_tests(rehearse)]
    parts += [_benchmark("cost", x, amp, output, rehearse) for amp in modes for x in pairs]
    parts += [_benchmark("teacher", x, "", output, rehearse) for x in pairs]
    parts += [_benchmark("memory", x, amp, output, rehearse) for amp in modes for x in pairs]
    return parts + [_training(amp, output, rehearse) for amp in modes]


def _tests(rehearse: bool) -> Part:
    words, env = ["-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"], {}
    if rehearse:
        words += ["-k", "draws"]
        env = {"D2KD_PRETEND_GPU": "1", "PYTORCH_JIT": "0"}

    def read(text: str) -> Rows:
        failed = re.findall(r"^FAILED (\S+)", text, re.MULTILINE)
        counts = re.findall(r"(\d+) (passed|failed|skipped|error)", text)
        return [{**{x: int(n) for n, x in counts}, "which": failed}]

    return Part("tests", words, read, env)


def _benchmark(kind: str, pair: str, amp: str, output: Path, rehearse: bool) -> Part:
    name = " ".join(filter(None, (f"{kind}, {pair}", amp[2:])))
    file = output / f"{_file_name(name)}.json"
    words = ["tools/benchmark.py", "--json", str(file), *filter(None, [amp])]
    heads, options = HEADS[pair].split(), TEACHERS.split()
    if rehearse:
        heads, options = heads[:1], options[:1]
        words += ["--config-file", "configs/quickstart/pkd.yaml", "--size", "64x64"]
        words += ["--device", "cpu", "--rounds", "1", "--warmup", "1"]
    else:
        words += ["--pair", pair, "--size", "800x1344", "--device", "cuda"]
        words += ["--rounds", "1" if kind == "memory" else "6"]
    words += ["--heads", *(heads if kind != "teacher" else ["PKD"])]
    words += {"cost": [], "memory": ["--memory"], "teacher": ["--teacher", *options]}[kind]

    def read(text: str) -> Rows:
        return benchmark_rows(json.loads(file.read_text()))

    return Part(name, words, read, file=file)


def benchmark_rows(report: Dict[str, Any]) -> Rows:
    """Each whole step of tools/benchmark.py's report, beside the plain student's."""
    alone, rows = report["seconds"]["student"], []
    for arm, seconds in report["seconds"].items():
        if arm != "student" and not arm.startswith("with "):
            continue
        row = {"step": arm, "ms": round(1000 * median(seconds), 2)}
        row["of the student's"] = round(median(x / y for x, y in zip(seconds, alone)), 3)
        if arm in report["peak_mib"]:
            row["GiB"] = round(report["peak_mib"][arm] / 1024, 2)
        rows.append(row)
    return rows


def _training(amp: str, output: Path, rehearse: bool) -> Part:
    name = " ".join(filter(None, ("training", amp[2:])))
    folder = output / _file_name(name)
    iterations, images, tests = (2, 8, 4) if rehearse else (300, 1000, 200)
    values = {
        "OUTPUT_DIR": folder,
        "MODEL.DEVICE": "cpu" if rehearse else "cuda",
        "SOLVER.AMP.ENABLED": bool(amp),
        "SOLVER.MAX_ITER": iterations,
        "SOLVER.WARMUP_ITERS": iterations // 10,
        "DATASETS.SHAPES.ROOT": output / "data",
        "DATASETS.SHAPES.NUM_TRAIN": images,
        "DATASETS.SHAPES.NUM_VAL": tests,
        "DISTILL.TEACHER.EVAL_IMAGES": tests,
    }
    words = ["train_net.py", "--config-file", "configs/quickstart/pkd.yaml"]
    words += [str(x) for pair in values.items() for x in pair]

    def read(text: str) -> Rows:
        metrics = Metrics(str(folder))
        seconds, ap = metrics.curve("time").values, metrics.curve("bbox/AP").values
        row = {"iterations": metrics.done, "s an iteration": median(seconds)} if seconds else {}
        return [{**row, "AP": ap[-1] if ap else None}]

    return Part(name, words, read, file=folder / "metrics.json")


def run(part: Part, output: Path, seconds: float) -> None:
    """Run a part for at most so many seconds; never raises for what goes wrong in it."""
    if seconds <= 0:
        part.state = "out of time"
        return
    if part.file:
        part.file.unlink(missing_ok=True)  # an earlier check's would be taken for this one's
    start, log = time.monotonic(), output / part.log
    env = {**os.environ, **part.env, "PYTHONPATH": _with_root(os.environ.get("PYTHONPATH", ""))}
    with open(log, "w") as file:
        child = subprocess.Popen(
            [sys.executable, *part.words],
            cwd=ROOT,
            env=env,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            part.state = "failed" if child.wait(seconds) else "ok"
        except subprocess.TimeoutExpired:
            part.state = "out of time"
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # with the processes that it has started
                child.wait()
    part.seconds = time.monotonic() - start
    text = log.read_text(errors="replace")
    try:
        part.rows = part.read(text)
    except (OSError, ValueError, KeyError):  # it did not come that far
        part.rows = [{"last line": (text.strip().splitlines() or ["none"])[-1]}]


def _with_root(path: str) -> str:
    return os.pathsep.join(filter(None, (str(ROOT), path)))


def show(part: Part) -> None:
    print(f"\n{part.name}: {part.state}, {part.seconds:.0f} s", flush=True)
    for row in part.rows:
        print("  " + ", ".join(f"{k} {v}" for k, v in row.items()), flush=True)


def hardware() -> Dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    return {"gpus": gpus, **versions, "detectron2": detectron2.__version__}


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("gpu_check.py", __doc__, GUIDE)
    add = parser.add_argument
    add("--minutes", type=float, default=12.0, help="for all parts together; default %(default)s")
    add("--output", type=Path, default=Path("output/gpu_check"), help="default %(default)s")
    add("--only", nargs="+", metavar="PART", default=[], help="whose names begin with these words")
    add("--rehearse", action="store_true", help="try this script without a GPU")
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """
    Returns:
        0 if all parts are done

    Raises:
        ValueError: there is no GPU
    """
    args = parse_args(argv)
    if not (args.rehearse or torch.cuda.is_available()):
        raise ValueError("PyTorch sees no GPU. --rehearse tries this script without one.")
    output, end = args.output.absolute(), time.monotonic() + 60 * args.minutes
    output.mkdir(parents=True, exist_ok=True)
    parts = parts_of(output, args.rehearse)
    if args.only:
        parts = [x for x in parts if x.name.startswith(tuple(args.only))]
    found = {"rehearsal": args.rehearse, **hardware()}
    print(json.dumps(found))
    for i, part in enumerate(parts):
        # No part may take the time of all others.
        run(part, output, min(end - time.monotonic(), 24 * args.minutes))
        show(part)
        rows = [
            {k: v for k, v in asdict(x).items() if k not in ("read", "file")}
            for x in parts[: i + 1]
        ]
        (output / "gpu_check.json").write_text(json.dumps({**found, "parts": rows}, indent=2))
    return int(any(x.state != "ok" for x in parts))


if __name__ == "__main__":
    sys.exit(run_command("gpu_check.py", main))
