#!/usr/bin/env python
"""
Write a JSON in COCO's format with some of its classes: what a teacher of these classes learns from.

All images stay; category ids stay too. Objects of other classes become background.
"""

import argparse
import json
import os
import sys
from typing import Any, Dict, Optional, Sequence

from d2kd.cli.common import command_parser
from d2kd.utils.atomic_file import write_json
from d2kd.utils.checks import nearest
from d2kd.utils.user_mistakes import run_command


def choose(data: Dict[str, Any], classes: Sequence[str]) -> Dict[str, Any]:
    """
    Args:
        data: in COCO's format
        classes: names of categories

    Raises:
        ValueError: a name that it does not have
    """
    known = [x["name"] for x in data["categories"]]
    for name in classes:
        if name not in known:
            hint = "".join(f" Did you mean {x!r}?" for x in nearest(name, known))
            raise ValueError(f"--classes {name!r}: the categories are {', '.join(known)}.{hint}")
    categories = [x for x in data["categories"] if x["name"] in classes]
    ids = {x["id"] for x in categories}
    annotations = [x for x in data["annotations"] if x["category_id"] in ids]
    return {**data, "categories": categories, "annotations": annotations}


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = command_parser("choose_classes.py", __doc__, "")
    parser.add_argument("source", help="JSON in COCO's format")
    parser.add_argument("target", help="JSON to write")
    parser.add_argument("--classes", nargs="+", required=True, metavar="NAME", help="that stay")
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    with open(args.source) as file:
        data = choose(json.load(file), args.classes)
    os.makedirs(os.path.dirname(args.target) or ".", exist_ok=True)
    write_json(args.target, data)  # which may be the source
    print(
        f"{args.target}: {len(data['images'])} images, {len(data['annotations'])} objects of "
        f"{', '.join(x['name'] for x in data['categories'])}"
    )


if __name__ == "__main__":
    sys.exit(run_command("choose_classes.py", main))
