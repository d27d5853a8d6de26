"""What other commands found out about a run, in folders of their own."""

import json
import os
from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from ..export.graph import FORMATS
from .blocks import Facts, Part, Picture, Section, Table, Text
from .charts import data_uri


def verdict(folder: str, compared: str = "") -> Part:
    """
    Args:
        folder: OUTPUT_DIR
        compared: what d2kd compare wrote to; "": its default, or the folder that OUTPUT_DIR is in

    Raises:
        FileNotFoundError: d2kd compare did not write there
    """
    usual = [f"{folder.rstrip('/')}_paired", os.path.dirname(os.path.abspath(folder))]
    place = _place("compare", compared, usual, "results.csv")
    if place is None:
        return "Verdict: nobody asked whether the teacher is worth it (d2kd compare)."
    lines = (place / "table.md").read_text().splitlines()
    cells = [[x.strip() for x in line.strip("|").split("|")] for line in lines if line[:1] == "|"]
    text = "\n".join(x for x in lines if x[:1] != "|").strip()
    picture = data_uri((place / "gain.png").read_bytes(), "image/png")
    blocks = [
        Table(cells[0], cells[2:], range(1, len(cells[0]))),
        Text(text),
        Picture("AP of each seed, and gain", picture, wide=True),
    ]
    return Section("Is the teacher worth it?", blocks)


def export_proof(folder: str, exported: str = "") -> Part:
    """
    Args:
        folder: OUTPUT_DIR
        exported: what d2kd export wrote to; "": a folder in OUTPUT_DIR

    Raises:
        FileNotFoundError: d2kd export did not write there
    """
    usual = sorted(str(x.parent) for x in Path(folder).glob("*/report.json"))
    place = _place("export", exported, usual, "report.json")
    if place is None:
        return "Export: there is none in OUTPUT_DIR (d2kd export, --export)."
    report = json.loads((place / "report.json").read_text())
    rows = [["weights", report["weights"]], ["student.pth, student.yaml", _proof(report)]]
    rows += [[report[x].get("file", x), _proof(report[x])] for x in FORMATS if x in report]
    return Section("Export", [Facts(rows)])


def _place(command: str, named: str, usual: Sequence[str], file: str) -> Optional[Path]:
    """
    Args:
        command: of d2kd that writes the file, and the option that names its folder
        named: by the user; "": nothing
        usual: folders to look in otherwise

    Returns:
        the first folder that has the file
    """
    folders = [named] if named else usual
    found = next((Path(x) for x in folders if (Path(x) / file).is_file()), None)
    if named and found is None:
        raise FileNotFoundError(
            f"--{command}: there is no {file} in {named!r}. Name a folder of d2kd {command}."
        )
    return found


def _proof(found: Dict[str, Any]) -> str:
    """Of an export, or of a graph beside it, in words."""
    if found.get("no_yaml"):
        return f"not proved: {found['no_yaml']}"
    if found.get("error"):
        return f"not proved: {found['error']}"
    count = f"{found['detections']} detections"
    if not found["verified"]:
        return f"NOT the student of the run ({count})"
    if found.get("equal", found["detections"]) < found["detections"]:
        return f"verified: {found['equal']} of {count} are the same"
    return f"verified: the same to the bit ({count})"
