"""
List the distillation heads; of those that are named, also the config keys, with their defaults and
what they are for.
"""

import argparse
import inspect
import sys
import textwrap
from typing import Optional, Sequence

from detectron2.config import CfgNode

from ..cli.common import add_plugin_option, command_parser, import_plugins
from ..config.describe import explained
from ..config.key_comments import documented
from ..config.load import leaves
from ..utils.user_mistakes import run_command
from .keys import add_head_keys, key_of, knobs
from .registry import head_class, head_names

EXAMPLES = """
Examples:
  d2kd heads
  d2kd heads MGD FGD
  d2kd heads --plugin my_head.py Cosine
"""

REFERENCE_PIXELS = (
    "the loss is a sum over cells, so its share grows with the image, and a weight is right for "
    "one input size. 0: as published, for 800x1344. N > 0: LOSS_WEIGHT means at every input size "
    "what it means at N pixels; 1075200 is 800x1344 and lets the published weights be typed in at "
    "any size"
)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    import_plugins(args)
    if args.names:
        print("\n\n".join(f"{describe(name)}\n\n{describe_keys(name)}" for name in args.names))
    else:
        print("\n".join(describe(name) for name in head_names()))
        print("\nd2kd heads NAME: the keys of a head.")


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("d2kd heads", __doc__, EXAMPLES)
    parser.add_argument("names", nargs="*", metavar="NAME", help="as in DISTILL.HEADS")
    add_plugin_option(parser)
    return parser.parse_args(argv)


def describe(name: str) -> str:
    """
    Args:
        name: of a head, as in DISTILL.HEADS

    Returns:
        its name and, indented, how its docstring begins

    Raises:
        ValueError: no head of that name
    """
    beginning = (inspect.getdoc(head_class(name)) or "").split("\n\n")[0]
    indented = {"initial_indent": " " * 4, "subsequent_indent": " " * 4}
    return "\n".join([name, *textwrap.wrap(beginning, 96, **indented)])


def describe_keys(name: str) -> str:
    """
    Args:
        name: of a head, as in DISTILL.HEADS

    Returns:
        a line for each key with its default, and below it what the docstrings say of it

    Raises:
        ValueError: no head of that name
    """
    head, node = head_class(name), CfgNode()
    add_head_keys(node, head)
    texts = {"REFERENCE_PIXELS": REFERENCE_PIXELS, **documented(head)}
    for argument, default in knobs(head).items():
        nested = documented(type(default)).items()
        texts.update({f"{argument.upper()}.{field}": text for field, text in nested})
    values, texts = (
        {f"{key_of(head)}.{k}": v for k, v in x.items()} for x in (dict(leaves(node)), texts)
    )
    return explained(values, texts)


if __name__ == "__main__":
    sys.exit(run_command("d2kd heads", main))
