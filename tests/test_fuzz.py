"""Any value of any key gives a run or an error that names the key."""

import random
from pathlib import Path
from typing import Any, List

import pytest

from d2kd import doctor, load_config
from d2kd.config import flatten
from d2kd.heads.build import head_class, head_names
from d2kd.pairs import ANY_PAIR

from toys import distill_config, write_teacher

VALUES = ["-1", "0", "0.5", "1e9", "-1e-9", "nan", "inf", "''", "abc", "[]", "[1]", "[['p3','p3']]"]
VALUES += ["[['p9','p3']]", "True", "None", "{'A': 1}", "[{'ITERATIONS': 1}]", "10000000"]
HEADS = [x for x in head_names() if "dense -> dense" in getattr(head_class(x), "pairs", ANY_PAIR)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The YAML of a toy distillation."""
    folder = tmp_path_factory.mktemp("fuzz")
    opts = write_teacher(folder, "retinanet", MODEL__RETINANET__NORM="")
    cfg = distill_config("retinanet", opts, ["PKD"], MODEL__RETINANET__NORM="")
    cfg.DISTILL.CrossKD.DEPTH = 1
    (folder / "run.yaml").write_text(cfg.dump())
    return str(folder / "run.yaml")


def cases(path: str, count: int) -> List[List[str]]:
    """KEY VALUE, with the head that reads the key."""
    drawn = random.Random(0)
    keys = sorted(x for x in flatten(load_config(path)) if x.startswith("DISTILL."))
    found: List[List[str]] = []
    while len(found) < count:
        key, value = drawn.choice(keys), drawn.choice(VALUES)
        owner = key.split(".")[1]
        if owner in head_names() and owner not in HEADS:
            continue
        heads = [owner] if owner in HEADS else [drawn.choice(HEADS)]
        found.append(["DISTILL.HEADS", str(heads), key, value])
    return found


def test_any_value_of_any_key_is_run_or_refused_by_its_name(
    path: str, capsys: pytest.CaptureFixture
) -> None:
    refused = 0
    for opts in cases(path, count=150):
        code = doctor.main(["--config-file", path, *opts])  # raises nothing
        said = capsys.readouterr().err
        if code:
            refused += 1
            # A weight of 1e9 can be run: into infinity, which is told as what it is.
            assert opts[2].split(".")[-1] in said or "is not finite" in said, (opts, said)
    assert 30 < refused < 150


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "3",
        "a: [",
        "DISTILL: 3",
        "DISTILL: {HEADS: {A: 1}}",
        "MODEL: null",
        "\t",
        "_BASE_: x",
    ],
)
def test_yaml_that_is_none_is_refused_by_the_name_of_its_file(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    assert doctor.main(["--config-file", str(file)]) == 1
    said: Any = capsys.readouterr().err
    assert (
        "odd.yaml" in said or "DISTILL" in said or "MODEL" in said or "'x'" in said or "/x" in said
    )
