"""What the command lines of d2kd share: --config-file, --plugin, KEY VALUE, --traceback."""

import argparse
from typing import NoReturn

from detectron2.config import CfgNode

from ..config import load_config
from ..config.unread import refuse_unread
from ..utils.command_line import add_overrides
from ..utils.packaged import find_file
from ..utils.plugin import import_file


class _Parser(argparse.ArgumentParser):
    """Without the usage before an error, which is several lines of options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def command_parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    """
    Args:
        name: of the command, such as "d2kd train"
        description, examples: for --help, before and behind the options, printed as they are
    """
    parser = _Parser(
        prog=name,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--traceback",
        action="store_true",
        help="after a mistake in what the command is given, show where it was found",
    )
    return parser


def add_plugin_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE",
        help="Python file that registers heads, views or detectors of yours; may be repeated",
    )


def add_config_options(
    parser: argparse.ArgumentParser, required: bool = True, overrides: str = "config overrides"
) -> None:
    """
    Declare what :func:`read_config` reads, for :func:`parse_command_line`.

    Args:
        required: without --config-file there is nothing to do
        overrides: for --help, what they change
    """
    parser.add_argument(
        "--config-file",
        required=required,
        default="",
        metavar="FILE",
        help="YAML of the run: a path, or one of d2kd's own, such as quickstart/pkd.yaml",
    )
    add_plugin_option(parser)
    add_overrides(parser, overrides)


def import_plugins(args: argparse.Namespace) -> None:
    for path in args.plugin:
        import_file(path)


def read_config(args: argparse.Namespace) -> CfgNode:
    """
    Import the plug-ins, then read the YAML and the overrides of a command line.

    Raises:
        ValueError, FileNotFoundError: what is wrong with them; also overrides without effect
    """
    import_plugins(args)  # before the config, to which a head adds its keys
    args.config_file = find_file(args.config_file)
    cfg = load_config(args.config_file, args.opts)
    refuse_unread(cfg, args.opts, "The command line")
    return cfg
