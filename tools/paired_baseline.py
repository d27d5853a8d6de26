#!/usr/bin/env python
"""
Is the teacher worth it? Train a student with its teacher and, from the same YAML, without: same
seed, same batches in the same order, same schedule. Over several seeds, on the same images.
"""

import argparse
import csv
import math
import os
import sys
from typing import Dict, List, Optional, Sequence

import numpy as np
from pycocotools.coco import COCO
from tabulate import tabulate

from detectron2.config import CfgNode
from detectron2.data import Metadata, MetadataCatalog

from d2kd import load_config, student_config
from d2kd.cli.common import add_config_options, command_parser, read_config
from d2kd.cli.steps import stop_on_sigterm
from d2kd.data import register_datasets
from d2kd.engine.evaluator import complete_truth
from d2kd.engine.preflight.check_config import check_config
from d2kd.utils.command_line import parse_command_line
from d2kd.utils.distils import distils
from d2kd.utils.silent import silent
from d2kd.utils.user_mistakes import run_command
from paired_ap import SAMPLES, ImageAP, image_error, read_detections
from paired_fit import describe_fit
from paired_verdict import Verdict, decide
from quickstart import MASK_AP, Steps, mask_warning, metrics_of

ARMS = ("alone", "distilled")
ROUNDING = 0.01  # AP, of what a run logs
EPILOG = """
The folder receives a run for each arm and seed (one that was finished is not repeated, one that was
interrupted goes on), table.md, results.csv and gain.png.

The verdict is by a rule that is fixed before the runs. What counts is a gain of more than
--threshold AP. Its 95 % interval has both in it: other seeds (Student's t over the differences of
each seed) and other images (a bootstrap over the first test set). Above the threshold it is GAIN,
below it NO GAIN; with the threshold in it INCONCLUSIVE, and how many more seeds would decide is
told. Where there is no gain, GAIN is said in less than 5 % of all cases (simulated in the tests) if
the number of seeds is fixed before: who adds one by one, from 3 to 10, until it is decided has up
to 8 % where the gain is just the threshold. One seed decides nothing.

examples:
  d2kd compare --config-file configs/quickstart/pkd.yaml --seeds 1 2 3
  d2kd compare --config-file run.yaml --seeds 1 SOLVER.MAX_ITER 1000
"""

Results = Dict[str, Dict[int, Dict[str, float]]]


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    cfg = read_config(args)
    if not distils(cfg):
        raise ValueError(
            f"--config-file: {args.config_file} trains a student alone, so there is nothing to "
            "compare it with. Name the YAML of a distillation, with DISTILL.ENABLED True."
        )
    args.output = args.output or cfg.OUTPUT_DIR.rstrip("/") + "_paired"
    if len(cfg.DATASETS.TEST) > 1:  # of several, the runs would leave the last one's detections
        args.opts += ["DATASETS.TEST", repr(tuple(cfg.DATASETS.TEST[:1]))]
    # All that would stop the second arm, before the first is trained.
    check_config(cfg)
    truth = truth_of(cfg)
    register_datasets(cfg, student_config(cfg).MODEL.META_ARCHITECTURE, ("TRAIN",), draw=False)
    results: Results = {arm: {} for arm in ARMS}
    steps = Steps(args.fresh)
    stop_on_sigterm()
    for seed in args.seeds:
        for arm in ARMS:
            print(f"\n{arm}, seed {seed}", flush=True)
            opts = opts_of(arm, seed, args)
            results[arm][seed] = steps.run(args.config_file, opts, plugins=args.plugin)
    with silent():
        verdict = verdict_of(args, truth, results)
        masks = verdict_of(args, truth, results, "segm") if have_masks(results) else None
    report = make_report(results, verdict, args.samples, masks)
    runs = [tuple(folder_of(arm, seed, args) for arm in ARMS) for seed in args.seeds]
    report += "\n".join(filter(None, ["", describe_fit(runs)]))
    if cfg.DISTILL.STAGES and cfg.DISTILL.STAGE_LR == "restart":
        report += (
            '\nNot the same schedule: by DISTILL.STAGE_LR "restart", the distilled student has its '
            "learning rate\nanew in each stage. The student alone has one schedule."
        )
    print("\n" + report)
    with open(os.path.join(args.output, "table.md"), "w") as file:
        file.write(report + "\n")
    draw(results, verdict, os.path.join(args.output, "gain.png"))
    # Last: by this file d2kd report finds the others.
    write_csv(results, os.path.join(args.output, "results.csv"))
    print(f"\nIn {args.output}: table.md, results.csv, gain.png and the runs.")


def opts_of(arm: str, seed: int, args: argparse.Namespace) -> List[str]:
    alone = ["DISTILL.ENABLED", "False"] if arm == "alone" else []
    folder = os.path.join(args.output, f"{arm}_seed_{seed}")
    return [*args.opts, *alone, "SEED", str(seed), "OUTPUT_DIR", folder]


def folder_of(arm: str, seed: int, args: argparse.Namespace) -> str:
    return load_config(args.config_file, opts_of(arm, seed, args)).OUTPUT_DIR


def truth_of(cfg: CfgNode) -> COCO:
    """
    The first test set, read before hours of training rather than after them.

    Raises:
        ValueError: there is none in COCO's format
    """
    register_datasets(cfg, "", parts=("TEST",))
    names = cfg.DATASETS.TEST
    metadata = MetadataCatalog.get(names[0]) if names else Metadata()
    # LVIS has a JSON too, but its evaluator another AP, and another file of detections.
    if metadata.get("evaluator_type") != "coco" or not metadata.get("json_file"):
        raise ValueError(
            f"DATASETS.TEST is {names}: an interval needs a test set in COCO's format."
        )
    with silent():
        truth = COCO(metadata.json_file)
    complete_truth(truth)
    return truth


def metrics_in(results: Results) -> List[str]:
    return metrics_of(*(x for runs in results.values() for x in runs.values()))


def have_masks(results: Results) -> bool:
    return MASK_AP in metrics_in(results)


def verdict_of(
    args: argparse.Namespace, truth: COCO, results: Results, task: str = "bbox"
) -> Verdict:
    """
    Raises:
        ValueError: detections that are no longer those of a run
    """
    found: Dict[str, List[np.ndarray]] = {arm: [] for arm in ARMS}
    key = MASK_AP if task == "segm" else "AP"
    for arm in ARMS:
        for seed in args.seeds:
            folder = folder_of(arm, seed, args)
            path = os.path.join(folder, "inference", "coco_instances_results.json")
            measure = ImageAP(truth, read_detections(path), task)
            there, then = measure(range(measure.num_images)), results[arm][seed][key]
            if abs(there - then) > ROUNDING:
                raise ValueError(
                    f"{path} has {there:.2f} AP and the run had {then:.2f}: it was evaluated again "
                    "with other weights. Evaluate its last ones once more, or add --fresh:\n"
                    f"  d2kd eval --config-file {folder}/config.yaml "
                    f"MODEL.WEIGHTS {folder}/model_final.pth"
                )
            found[arm].append(measure.samples(args.samples))
    error = image_error(found["alone"], found["distilled"])
    gains = [results["distilled"][x][key] - results["alone"][x][key] for x in args.seeds]
    return decide(gains, error, args.threshold)


def make_report(
    results: Results, verdict: Verdict, samples: int, masks: Optional[Verdict] = None
) -> str:
    """
    A table of both arms and the gain, a line for each seed, and the verdict.

    Args:
        masks: the verdict on masks, of detectors that have some
    """
    rows, metrics = [], metrics_in(results)
    means = {arm: mean_of(results[arm], metrics) for arm in ARMS}
    for arm in ARMS:
        rows.append([arm] + [number(means[arm][k]) for k in metrics])
    gains = {k: means["distilled"][k] - means["alone"][k] for k in metrics}
    rows.append(["gain"] + [number(gains[k], "+") for k in metrics])
    table = tabulate(rows, ["", *metrics], tablefmt="github", disable_numparse=True)
    seeds = [
        f"  seed {seed}: {results['alone'][seed]['AP']:.1f} alone, {x['AP']:.1f} distilled, "
        f"{x['AP'] - results['alone'][seed]['AP']:+.1f}"
        for seed, x in results["distilled"].items()
    ]
    lines = [table, "", f"AP, mean of {len(seeds)} seeds:", *seeds, "", str(verdict)]
    if masks:
        lines += filter(None, [f"Masks: {masks}", mask_warning(gains)])
    lines.append(f"(Student's t over seeds, {samples} bootstrap samples of the images.)")
    return "\n".join(lines)


def number(value: float, sign: str = "") -> str:
    """AP, or "-" where the test set has no object of that size."""
    return "-" if math.isnan(value) else f"{value:{sign}.1f}"


def mean_of(runs: Dict[int, Dict[str, float]], metrics: Sequence[str]) -> Dict[str, float]:
    return {k: float(np.mean([x[k] for x in runs.values()])) for k in metrics}


def write_csv(results: Results, path: str) -> None:
    with open(path, "w", newline="") as file:
        writer, metrics = csv.writer(file), metrics_in(results)
        writer.writerow(["arm", "seed", *metrics])
        for arm, runs in results.items():
            for seed, values in runs.items():
                writer.writerow([arm, seed, *(f"{values[k]:.4f}" for k in metrics)])


def draw(results: Results, verdict: Verdict, path: str) -> None:
    """AP of every seed, a line from alone to distilled, and the gain with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8, 4), width_ratios=(3, 1))
    for seed in results["alone"]:
        values = [results[arm][seed]["AP"] for arm in ARMS]
        left.plot(ARMS, values, marker="o", label=f"seed {seed}")
    left.set(ylabel="AP", title="the same student", ylim=(0, None))
    left.legend()
    half = verdict.high - verdict.gain
    bars = None if math.isinf(half) else [half]  # of one seed there is none
    right.errorbar([0], [verdict.gain], bars, fmt="o", capsize=6, color="black")
    right.axhline(0, color="grey", linewidth=1)
    right.axhline(verdict.threshold, color="grey", linewidth=1, linestyle=":")
    right.set(title="gain in AP", xticks=[], xlim=(-1, 1))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("d2kd compare", __doc__, EPILOG)
    add_config_options(parser, overrides="overrides for both arms")
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    add("--output", default="", metavar="FOLDER", help="default: OUTPUT_DIR of the YAML + _paired")
    add("--samples", type=int, default=SAMPLES, help="of the bootstrap; default %(default)s")
    add("--threshold", type=float, default=0.5, help="AP that a gain exceeds; default %(default)s")
    add("--fresh", action="store_true", help="train anew what was trained before")
    args = parse_command_line(parser, argv)
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        parser.error(f"--seeds must be different and not negative, got {args.seeds}")
    check_rule(parser, args)
    return args


def check_rule(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse what makes no verdict: the error of one sample is not a number."""
    if args.samples < 2:
        parser.error(f"--samples must be 2 or more, got {args.samples}")
    if not 0 <= args.threshold < 100:
        parser.error(f"--threshold must be in [0, 100), got {args.threshold}")


if __name__ == "__main__":
    sys.exit(run_command("d2kd compare", main))
