"""Command lines with config overrides, KEY VALUE ..., anywhere among the options."""

import argparse
import re
import sys
from typing import List, Optional, Sequence, Tuple

import cv2

from detectron2.config import get_cfg

from .checks import nearest

# MODEL.WEIGHTS, DISTILL.ReviewKD.LOSS_WEIGHT, SEED
_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.\w+)*")
_NUMBER = re.compile(r"-\.?\d")


def count(text: str) -> int:
    """`type` of an option that counts something, of which there is one at least."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def picture(text: str) -> str:
    """`type` of a picture to write, refused before hours of work rather than after them."""
    if not cv2.haveImageWriter(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a picture, such as a.png")
    return text


def add_overrides(parser: argparse.ArgumentParser, text: str = "config overrides") -> None:
    """Declare the overrides that :func:`parse_command_line` reads; `text` is for --help."""
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help=text)


def parse_command_line(
    parser: argparse.ArgumentParser, argv: Optional[Sequence[str]] = None
) -> argparse.Namespace:
    """
    Parse options and overrides in any order; a list option ends where a config key begins.

    argparse alone would assign all following words to a list option, and all options after the
    first override to the overrides.

    Args:
        parser: parser of a command whose overrides are the positional "opts"
        argv: default: sys.argv[1:]

    Returns:
        the options, and "opts": [KEY, VALUE, ...]
    """
    options, overrides = _split(parser, list(sys.argv[1:] if argv is None else argv))
    args = parser.parse_args(options)
    args.opts = overrides
    return args


def _split(parser: argparse.ArgumentParser, words: List[str]) -> Tuple[List[str], List[str]]:
    """
    Returns:
        the words for argparse, and the overrides
    """
    positionals = sum(not x.option_strings and x.dest != "opts" for x in parser._actions)
    options: List[str] = []
    overrides: List[str] = []
    while words:
        word = words.pop(0)
        if word == "--":
            continue
        action = _option(parser, word)
        if action:
            options.append(word)
            options += _values_of(parser, action, words) if "=" not in word else []
        elif word.startswith("-") and not _NUMBER.match(word):
            near = nearest(word, parser._option_string_actions)
            hint = f" (did you mean {near[0]}?)" if near else ""
            parser.error(f"there is no option {word}{hint}")
        elif positionals:
            options.append(word)
            positionals -= 1
        else:
            overrides += [word, _value_of(parser, word, words)]
    return options, overrides


def _option(parser: argparse.ArgumentParser, word: str) -> Optional[argparse.Action]:
    """The option that a word names, possibly abbreviated or followed by "=" and a value."""
    known, name = parser._option_string_actions, word.partition("=")[0]
    if name in known:
        return known[name]
    meant = {id(v): v for k, v in known.items() if name.startswith("--") and k.startswith(name)}
    return next(iter(meant.values())) if len(meant) == 1 and name != "--" else None


def _values_of(
    parser: argparse.ArgumentParser, action: argparse.Action, words: List[str]
) -> List[str]:
    """Take the values of an option from `words`; argparse reports if there are too few."""
    several = action.nargs in ("+", "*")
    count = 1 if action.nargs is None else action.nargs
    values: List[str] = []
    while words and (several or len(values) < count):
        if _option(parser, words[0]) or (several and _begins_overrides(words[0])):
            break
        values.append(words.pop(0))
    return values


def _begins_overrides(word: str) -> bool:
    """Whether a word is a config key, not another value of a list, such as a head's name."""
    return bool(_KEY.fullmatch(word)) and ("." in word or word in get_cfg())


def _value_of(parser: argparse.ArgumentParser, key: str, words: List[str]) -> str:
    """Take the value of an override from `words`."""
    name, equals, value = key.partition("=")
    if equals and _KEY.fullmatch(name):
        parser.error(f"overrides are written KEY VALUE: {name} {value}, not {key}")
    if not _KEY.fullmatch(key):
        parser.error(
            f"{key} is neither an option nor a config key; a value with spaces needs quotes"
        )
    if not words:
        parser.error(f"the config key {key} has no value")
    if _option(parser, words[0]):
        parser.error(f"the config key {key} has no value: {words[0]} is an option")
    return words.pop(0)
