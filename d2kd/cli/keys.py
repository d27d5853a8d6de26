"""Print config keys with their defaults and what they are for."""

import argparse
from typing import Optional, Sequence

from ..config.describe import describe
from .common import add_plugin_option, command_parser, import_plugins

EXAMPLES = """
Examples:
  all that d2kd adds to Detectron2's, but for those of single heads:
    d2kd keys
  a group of keys, one key, a pattern; also Detectron2's own:
    d2kd keys DISTILL.TEACHER
    d2kd keys SOLVER.CLIP_GRADIENTS TEST.EVAL_PERIOD
    d2kd keys 'DISTILL.*.LOSS_WEIGHT'

d2kd heads MGD prints the keys of a head with the explanations of its docstrings.
"""


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    import_plugins(args)
    print(describe(args.keys))


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("d2kd keys", __doc__, EXAMPLES)
    parser.add_argument("keys", nargs="*", metavar="KEY", help="or a group, or a pattern")
    add_plugin_option(parser)
    return parser.parse_args(argv)
