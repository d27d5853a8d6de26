"""
See what distillation does, in minutes, from nothing: train a small detector alone, train it again
with a teacher beside it, and compare the two on a test set on which nothing was chosen. Same seed,
same batches in the same order, same schedule; the teacher is the only difference.

Each step is a d2kd command, printed so that you can run it yourself. A step that was finished
before is not repeated; one that was interrupted goes on where it stopped. On a CPU both students
are trained at once, with one thread each: nets as small as these gain nothing from a second.
"""

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Dict, List, Optional, Sequence

from tabulate import tabulate

from ..config import load_config
from ..data import register_datasets
from ..utils.command_line import add_overrides, parse_command_line
from .common import command_parser
from .draw_detections import draw_detections
from .steps import METRICS, Steps

EXAMPLES = """
Examples:
  d2kd quickstart
  another method:
    d2kd quickstart --distilled configs/quickstart/mgd.yaml
"""
CHOSEN_ON, TEST = ("d2kd_shapes_val",), ("d2kd_shapes_test",)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    if load_config(args.distilled, args.opts).DATASETS.TEST == CHOSEN_ON:
        args.opts = ["DATASETS.TEST", repr(TEST), *args.opts]
    cfg = load_config(args.distilled, args.opts)
    register_datasets(cfg)  # draws the built-in images once, before two processes need them
    students = {"student alone": args.student, "student distilled": args.distilled}
    steps, start = Steps(args.fresh), time.perf_counter()

    teacher, weights = cfg.DISTILL.TEACHER.CONFIG_FILE, cfg.DISTILL.TEACHER.WEIGHTS
    teacher_opts = opts_for("teacher", args.opts)
    print(f"\n[1/2] teacher: {teacher}", flush=True)
    results = {"teacher": steps.run(teacher, teacher_opts, weights)}
    jobs = runs_at_once(cfg.MODEL.DEVICE)
    print(f"\n[2/2] both students, {'at once' if jobs > 1 else 'one after the other'}", flush=True)
    results.update(run_students(steps, students, args.opts, jobs))

    report = make_report(results, time.perf_counter() - start)
    print("\n" + report)
    folder = os.path.dirname(load_config(args.student, args.opts).OUTPUT_DIR.rstrip("/")) or "."
    with open(os.path.join(folder, "table.md"), "w") as file:
        file.write(report + "\n")
    panels = [(name, yaml, final_weights(yaml, args.opts)) for name, yaml in students.items()]
    panels.append(("teacher", teacher, weights or final_weights(teacher, teacher_opts)))
    draw_detections(panels, args.opts, rows=4, threshold=0.3, path=f"{folder}/detections.png")
    print(
        f"\nTable: {folder}/table.md. Picture: {folder}/detections.png. "
        f"Curves: tensorboard --logdir {folder}"
    )


def runs_at_once(device: str) -> int:
    """
    Two on a CPU with two cores or more; one on a GPU. Says where other work takes the cores.

    Args:
        device: MODEL.DEVICE
    """
    cores, busy = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    jobs = 2 if device == "cpu" and cores > 1 else 1
    if device == "cpu" and busy + jobs > cores + 0.5:
        print(
            f"\nOther work keeps {busy:.1f} of {cores} cores busy (mean of the last minute): "
            "this will take longer than on a quiet machine."
        )
    return jobs


def run_students(
    steps: Steps, students: Dict[str, str], opts: Sequence[str], jobs: int
) -> Dict[str, Dict[str, float]]:
    """
    Args:
        students: name of a step to its YAML
        jobs: steps at a time

    Returns:
        name to metrics, in the order of `students`
    """
    with ThreadPoolExecutor(jobs) as pool:
        futures = {
            name: pool.submit(steps.run, yaml, opts_for(name, opts), name=name)
            for name, yaml in students.items()
        }
        try:
            for future in as_completed(futures.values()):
                future.result()  # the first that fails ends the other
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            steps.stop()
            raise
    return {name: future.result() for name, future in futures.items()}


def make_report(results: Dict[str, Dict[str, float]], seconds: float) -> str:
    """The three rows and the gain, as a Markdown table with a sentence."""
    rows = [[name] + [f"{v[k]:.1f}" for k in METRICS] for name, v in results.items()]
    gains = [results["student distilled"][k] - results["student alone"][k] for k in METRICS]
    rows.append(["gain"] + [f"{x:+.1f}" for x in gains])
    table = tabulate(rows, ["", *METRICS], tablefmt="github", disable_numparse=True)
    verdict = (
        f"The teacher's company is worth {gains[0]:+.1f} AP to this student."
        if gains[0] > 0
        else f"No gain this time ({gains[0]:+.1f} AP)."
    )
    return f"{table}\n\n{verdict} ({seconds / 60:.1f} minutes; one seed, so take it as one draw.)"


def final_weights(config_file: str, opts: Sequence[str]) -> str:
    return os.path.join(load_config(config_file, opts).OUTPUT_DIR, "model_final.pth")


def opts_for(step: str, opts: Sequence[str]) -> List[str]:
    """
    The overrides that a step reads. They are about the two students; the teacher is told of device
    and data, the student alone of everything but the distillation.
    """
    kept = {
        "teacher": lambda key: key.startswith(("MODEL.DEVICE", "DATASETS.", "DATALOADER.")),
        "student alone": lambda key: not key.startswith("DISTILL."),
        "student distilled": lambda key: True,
    }
    pairs = zip(opts[0::2], opts[1::2])
    return [word for key, value in pairs if kept[step](key) for word in (key, value)]


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("d2kd quickstart", __doc__, EXAMPLES)
    folder = "configs/quickstart"
    parser.add_argument(
        "--student", default=f"{folder}/student.yaml", metavar="FILE", help="the student alone"
    )
    parser.add_argument(
        "--distilled", default=f"{folder}/cwd.yaml", metavar="FILE", help="with its teacher"
    )
    parser.add_argument("--fresh", action="store_true", help="train anew what was trained before")
    add_overrides(parser, "overrides for both students")
    return parse_command_line(parser, argv)
