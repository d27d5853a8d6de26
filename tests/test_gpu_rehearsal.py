"""The tests for GPUs run on the CPU, on a pretended GPU, in a process without TorchScript."""

import os
import re
import subprocess
import sys
import warnings
from typing import Iterable

import pytest

from d2kd.heads.registry import head_class, head_names
from tests.gpu.test_gpu_host import FASTER_RCNN, OPERATORS
from tests.helpers.toys import ROOT

# Every head takes a step in the test of its waits, between detectors of one kind; these take more.
# A head on features cannot tell other detectors from a RetinaNet; of some the operators on a Faster
# R-CNN's levels are recorded. Of a RepPoints, the regions alone are made in their own way.
ON_FEATURES = {x for x in head_names() if not hasattr(head_class(x), "requires")}
RECORDED = {name for name, pair in OPERATORS if pair == FASTER_RCNN}
ON_REGIONS = {"CKD", "MLD", "RoIFI", "SGFI"}


def any_of(names: Iterable[str]) -> str:
    return "(" + " or ".join(f"{x}-" for x in sorted(names)) + ")"


TAKEN = (
    "(waits or runs or draws or pretended or PKD-retinanet-to-retinanet or RoICls)"
    " and not float32 and not faster_rcnn-to-retinanet and not retinanet-to-faster_rcnn"
    f" and not (faster_rcnn and {any_of(ON_FEATURES - RECORDED)})"
    f" and not (reppoints and {any_of(set(head_names()) - ON_REGIONS)})"
)


@pytest.mark.process
def test_tests_for_gpus_pass_on_a_pretended_one() -> None:
    words = ["-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"]
    words += ["-W", "ignore", "-W", "default:RECORDED", "-k", TAKEN]
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "D2KD_PRETEND_GPU": "1", "PYTORCH_JIT": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
    for line in re.findall(r"RECORDED .*: lower it", done.stdout):
        warnings.warn(line)
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 50
