"""
Check the distillation heads in a Python file with the conformance tests of d2kd's own heads.

    d2kd check my_head.py
"""

import argparse
import inspect
import os
import sys
import tempfile
from typing import Optional, Sequence

import pytest

from ..cli.common import command_parser
from ..heads.registry import head_names
from ..utils.plugin import import_file
from ..utils.user_mistakes import run_command
from . import gradients, half_precision, numerics, saving, terms, two_processes
from .case import find_case, pairs_of

SUITE = """
from d2kd.conformance import conformance

TestHeads = conformance(*{names})
"""
EXAMPLES = """
For each pair of a small RetinaNet, Faster R-CNN, FCOS and RepPoints that the head supports:
{checks}

The same tests in your own test file:
    import my_head
    from d2kd.conformance import conformance

    TestCosine = conformance("Cosine", opts=["DISTILL.Cosine.EPS", 1e-3])

Examples:
  d2kd check my_head.py
  the pair with a two-stage teacher and a dense student, up to the first failure:
    d2kd check my_head.py -x -k faster_rcnn-to-retinanet
"""
CHECKS = (
    terms.check_names,
    terms.check_weight,
    terms.check_batch_size,
    terms.check_zero_at_equal,
    gradients.check_gradients,
    gradients.check_without_boxes,
    half_precision.check_mixed_precision,
    numerics.check_extreme_logits,
    numerics.check_image_sizes,
    saving.check_checkpoint,
    two_processes.check_processes,
)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """
    Returns:
        pytest's exit code: 0 if all heads of the file pass

    Raises:
        Exception: what a head's constructor raises
    """
    args = parse_args(argv)
    before = set(head_names())
    import_file(args.file)
    names = sorted(set(head_names()) - before)
    if not names:
        raise ValueError(
            f"{args.file} registers no head. A head is a class named <Name>Head under "
            "@DISTILL_HEAD_REGISTRY.register(); see d2kd.DISTILL_HEAD_REGISTRY.__doc__."
        )
    for name in names:  # else what a constructor raises is told by each test of each of them
        find_case(name, pairs_of(name)[0])
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "test_heads.py")
        with open(path, "w") as file:
            file.write(SUITE.format(names=names))
        options = ["--rootdir", folder, "-p", "no:cacheprovider", "-q", "-ra"]
        return int(pytest.main([path, *options, *args.pytest_args]))


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    checks = "\n".join("* " + _first_sentence(check) for check in CHECKS)
    title = inspect.getdoc(sys.modules[__name__]).splitlines()[0]
    parser = command_parser("d2kd check", title, EXAMPLES.format(checks=checks))
    parser.add_argument("file", help="Python file that registers heads, as for --plugin")
    parser.add_argument(
        "pytest_args",
        nargs=argparse.REMAINDER,
        metavar="...",
        help="what follows the file goes to pytest: -x, -k <name or pair>, --durations=10, ...",
    )
    return parser.parse_args(argv)


def _first_sentence(check: object) -> str:
    text = inspect.getdoc(check).split("\n\n")[0]
    return text.replace("\n", "\n  ")


if __name__ == "__main__":
    sys.exit(run_command("d2kd check", main))
