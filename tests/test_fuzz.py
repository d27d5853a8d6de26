"""Any value of any key, and any YAML, gives a run or an error that names the key or the file."""

import io
import random
import zipfile
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List, Sequence, Tuple

import pytest
import torch

import detectron2

from d2kd import doctor, load_config
from d2kd.config import leaves
from d2kd.data import register_datasets
from d2kd.engine.preflight.check_config import check_config
from d2kd.heads.registry import head_class, head_names
from d2kd.pairing.pair import ANY_PAIR
from d2kd.utils.safe_yaml import read_yaml
from tests.helpers.toys import DETECTORS, write_teacher

pytestmark = pytest.mark.fuzz

# By the type of a key: what nobody can mean, so that a key which takes it is not checked
NONSENSE = {
    bool: ["2", "abc", "[True]"],
    float: ["nan", "inf", "-inf", "-1e300", "abc"],
    int: ["-7", "-10000000000000000000000", "0.5", "True", "{'A': 1}"],
    str: ["é☃", "3", "a/../b"],
    list: ["[[]]", "[3]", "[None]", "[[['p3'], 'p3']]", "[{}]", "{}", "abc"],
}
# What somebody may, though not for every key of the type
SOUND = {
    bool: ["True", "False"],
    float: ["0.0", "0.5", "1.0", "1e9", "1e-300"],
    int: ["0", "1", "7", "10000000", "1000000000000"],
    str: ["''", "student", "ratio", "most", "cosine"],
    list: ["[]", "[1]", "[1, 2]", "['p3']", "[['p3', 'p3']]", "[{'ITERATIONS': 1}]", "['neck']"],
}
ODD = ["None", "{[]: 1}", "((((", "b'x'", "{1: 2}", "[{1: b'x'}]", "2020-01-01", "'", "-"]


ARCH = "MODEL.META_ARCHITECTURE"
# Student and teacher are alike. Short, for it is read hundreds of times.
RUN = """\
_BASE_: {base}
MODEL: {{META_ARCHITECTURE: Distiller}}
DISTILL:
  HEADS: [PKD]
  STUDENT_META_ARCHITECTURE: {student}
  TEACHER: {{CONFIG_FILE: {base}, WEIGHTS: {weights}}}
  CrossKD: {{DEPTH: 1}}
"""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, str]:
    """The YAML of a toy distillation of a dense and of a two-stage detector."""
    found = {}
    for name in ("retinanet", "faster_rcnn"):
        folder = tmp_path_factory.mktemp(name)
        opts = write_teacher(folder, name, MODEL__RETINANET__NORM="")
        path = folder / "run.yaml"
        path.write_text(RUN.format(base=opts[1], weights=opts[3], student=DETECTORS[name][ARCH]))
        found[name] = str(path)
    return found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "STEPS", 2)


def own_heads() -> List[str]:
    """d2kd's, not what other tests may have left in the registry."""
    return [x for x in head_names() if head_class(x).__module__.startswith("d2kd.")]


def readers(key: str) -> Tuple[str, str]:
    """A pair of detectors, and a head that is built for it and reads the key."""
    owner = key.split(".")[1]
    if owner not in own_heads():
        return "retinanet", "RoIFI" if owner == "REGIONS" else "PKD"
    dense = "dense -> dense" in getattr(head_class(owner), "pairs", ANY_PAIR)
    return "retinanet" if dense else "faster_rcnn", owner


def distill_keys(path: str) -> Dict[str, Any]:
    """Every key under DISTILL with its default, the schedule's of one head only."""
    cfg = load_config(path)
    keys = [x for x, _ in leaves(cfg) if x.startswith("DISTILL.")]
    keys = [x for x in keys if x.split(".")[1] not in set(head_names()) - set(own_heads())]
    keys = [x for x in keys if ".SCHEDULE." not in x or x.startswith("DISTILL.PKD")]
    return {key: reduce(getattr, key.split("."), cfg) for key in sorted(keys)}


def as_yaml(folder: Path, base: str, values: Sequence[Tuple[str, str]]) -> str:
    """A YAML on top of `base` in which the text of each value stands as it is."""
    lines = [f"_BASE_: {base}"]
    open_keys: List[str] = []
    for key, text in sorted(values):
        *above, last = key.split(".")
        same = 0
        while same < min(len(above), len(open_keys)) and above[same] == open_keys[same]:
            same += 1
        lines += ["  " * i + f"{above[i]}:" for i in range(same, len(above))]
        lines.append("  " * len(above) + f"{last}: {text}")
        open_keys = above
    (folder / "fuzz.yaml").write_text("\n".join(lines) + "\n")
    return str(folder / "fuzz.yaml")


def ask(capsys: pytest.CaptureFixture, *argv: str) -> Tuple[int, str]:
    """The doctor's exit code and what it says against the run; it raises nothing."""
    code = doctor.main(["--config-file", *argv])
    return code, capsys.readouterr().err


def names(said: str, key: str) -> bool:
    """Whether an error tells the key, or the head whose loss on noise became infinite."""
    *_, owner, last = key.split(".")
    infinite = "images of noise" in said and f"DISTILL.{key.split('.')[1]}." in said
    return owner in said and last in said or infinite


def test_no_key_takes_what_nobody_can_mean(
    pairs: Dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    drawn = random.Random(0)
    for key, default in distill_keys(pairs["retinanet"]).items():
        name, head = readers(key)
        value = drawn.choice(NONSENSE[type(default)])
        heads = [] if key == "DISTILL.HEADS" else ["DISTILL.HEADS", str([head])]
        if drawn.random() < 0.5:
            code, said = ask(capsys, pairs[name], *heads, key, value)
        else:
            code, said = ask(capsys, as_yaml(tmp_path, pairs[name], [(key, value)]), *heads)
        assert code == 2 and names(said, key), (key, value, said)


def test_any_two_values_are_run_or_one_is_refused_by_its_name(
    pairs: Dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    drawn, refused, count = random.Random(1), 0, 40
    defaults = distill_keys(pairs["retinanet"])
    keys = [x for x in defaults if x != "DISTILL.HEADS"]
    for _ in range(count):
        key = drawn.choice(keys)
        name, head = readers(key)
        other = drawn.choice([x for x in keys if readers(x) in [(name, head), readers("A.B")]])
        values = []
        for x in {key: 0, other: 0}:
            sound = drawn.random() < 0.8
            values.append((x, drawn.choice(SOUND[type(defaults[x])] if sound else ODD)))
        if drawn.random() < 0.5:
            argv = [pairs[name], *(word for pair in values for word in pair)]
        else:
            argv = [as_yaml(tmp_path, pairs[name], values)]
        code, said = ask(capsys, *argv, "DISTILL.HEADS", str([head]))
        refused += code != 0
        told = any(names(said, key) for key, _ in values) or "fuzz.yaml is not YAML" in said
        assert code == 0 or told, (values, said)
    assert count / 4 < refused < count


YAMLS = {
    "": "odd.yaml is empty",
    "[]": "odd.yaml holds list",
    "3": "odd.yaml holds int",
    "a: [": "odd.yaml is not YAML",
    "\t": "odd.yaml is not YAML",
    "é: \x07": "odd.yaml is not YAML",
    "a: 2020-13-13": "odd.yaml is not YAML",
    "[1, 2]: 3": "odd.yaml is not YAML",
    "DISTILL: 3": "odd.yaml: DISTILL must be a mapping of .*, got 3",
    "DISTILL:": "odd.yaml: DISTILL must be a mapping of .*, got None",
    "MODEL: []": r"odd.yaml: MODEL must be a mapping of .*, got \[\]",
    "DISTILL: {HEADS: {A: 1}}": "odd.yaml: DISTILL.HEADS must be a value such as",
    "DISTILL: {HEADS: !!set {PKD}}": "odd.yaml: .*DISTILL.HEADS .*'set'",
    "DISTILL: {HEADS: !!binary aGk=}": "odd.yaml: .*DISTILL.HEADS .*'bytes'",
    "DISTILL: {HEADS: 2020-01-01}": "odd.yaml: .*DISTILL.HEADS .*date",
    "DISTILL: {HEADS: " + "[" * 2000 + "]" * 2000 + "}": "odd.yaml is nested too deeply",
    "DISTILL: &a {PKD: *a}": r"odd.yaml (is nested too deeply|has unknown keys)",
    "DISTILL.HEADS: [PKD]": r"odd.yaml has unknown keys:\n  DISTILL.HEADS \(write it nested",
    "DISTILL: {null: 4, 3: 4}": r"odd.yaml has unknown keys:\n  DISTILL.None .*\n  DISTILL.3",
    "DISTILL: {HEADS: [PKD]}\nMODEL: {}\nDISTILL: {}": "is not YAML: duplicate key 'DISTILL'",
    "_BASE_: x": "odd.yaml: its _BASE_ .*x' does not exist",
    "_BASE_: odd.yaml": "odd.yaml: its _BASE_ leads back to itself",
    "_BASE_: 3": "odd.yaml: _BASE_ must name a YAML or a list of them, got 3",
    "_BASE_: [[]]": r"odd.yaml: _BASE_ must name a YAML or a list of them, got \[\]",
    "_BASE_: list.yaml": "list.yaml holds list",
    "_BASE_: run.yaml\nVERSION: {A: 1}": "VERSION is a mapping, but in its _BASE_ it is 2",
}


@pytest.mark.parametrize("text", YAMLS, ids=[x[:30] for x in YAMLS])
def test_yaml_that_is_none_is_refused_by_the_name_of_its_file(text: str, tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("[]")
    (tmp_path / "run.yaml").write_text("VERSION: 2")
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=YAMLS[text]):
        load_config(str(tmp_path / "odd.yaml"))


def test_bytes_are_no_yaml(tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match="odd.yaml is not YAML"):
        load_config(str(tmp_path / "odd.yaml"))


def test_base_of_a_url_may_be_relative_and_a_url_never_runs_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {
        "https://host/a/run.yaml": "_BASE_: base.yaml",
        "https://host/a/base.yaml": "VERSION: 2",
        "https://host/code.yaml": "VERSION: !!python/object/apply:os.getcwd []",
    }
    monkeypatch.setattr(
        "d2kd.utils.safe_yaml.PathManager",
        SimpleNamespace(open=lambda path, mode: io.BytesIO(files[path].encode())),
    )
    assert read_yaml("https://host/a/run.yaml") == {"VERSION": 2}
    # Detectron2's own files may.
    monkeypatch.chdir(Path(detectron2.__file__).parent)
    with pytest.raises(ValueError, match="https://host/code.yaml wants to run code"):
        read_yaml("https://host/code.yaml")


TEACHERS = {
    "empty.yaml": "",
    "list.yaml": "[]",
    "distiller.yaml": "MODEL: {META_ARCHITECTURE: Distiller}",
    "unknown.yaml": "QQ: 1",
    "type.yaml": "MODEL: {RETINANET: {NUM_CLASSES: x}}",
    "arch.yaml": "MODEL: {META_ARCHITECTURE: Foo}",
    "depth.yaml": "MODEL: {RESNETS: {DEPTH: 7}}",
    "code.py": "1 / 0",
    "empty.py": "",
    "text.pth": "hello",
    "text.txt": "abc",
    "text.pkl": "abc",
    "zip.pth": zipfile.ZipFile,
    "list.pth": [1, 2],
    "other.pth": {"model": {"a": torch.ones(1)}},
    "names.pth": {"model": {3: "x"}},
}


@pytest.mark.parametrize("name", TEACHERS)
def test_odd_teacher_is_refused_by_the_name_of_its_file(
    name: str, pairs: Dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    content, file = TEACHERS[name], tmp_path / name
    if content is zipfile.ZipFile:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("a", "b")
    elif isinstance(content, str):
        file.write_text(content)
    else:
        whole = io.BytesIO()
        torch.save(content, whole)
        file.write_bytes(whole.getvalue())
    is_config = file.suffix in (".yaml", ".py")
    key = "DISTILL.TEACHER." + ("CONFIG_FILE" if is_config else "WEIGHTS")
    code, said = ask(capsys, pairs["retinanet"], key, str(file))
    assert code == 2 and (name in said or key in said), said


@pytest.mark.parametrize("address", ["foo://bar", "http://[::1", "detectron2://", "\0", "."])
def test_odd_address_of_weights_is_refused_by_its_key(
    address: str, pairs: Dict[str, str], capsys: pytest.CaptureFixture
) -> None:
    code, said = ask(capsys, pairs["retinanet"], "DISTILL.TEACHER.WEIGHTS", address)
    assert code == 2 and "DISTILL.TEACHER.WEIGHTS" in said, said


# Keys beside DISTILL that d2kd adds or that it reads itself
OTHERS = ["DATASETS.COCO_FORMAT", "SEED", "VIS_PERIOD", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE"]
OTHERS += ["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", "SOLVER.MAX_ITER", "SOLVER.IMS_PER_BATCH"]


def test_no_other_key_of_ours_takes_what_nobody_can_mean(
    pairs: Dict[str, str], tmp_path: Path
) -> None:
    base = ["DATASETS.TRAIN", ("d2kd_shapes_train",), "DATASETS.SHAPES.ROOT", str(tmp_path)]
    base += ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "DISTILL.ENABLED", False]
    cfg, drawn = load_config(pairs["retinanet"]), random.Random(2)
    shapes = [x for x, _ in leaves(cfg) if x.startswith("DATASETS.SHAPES.") and "ROOT" not in x]
    for key in OTHERS + shapes:
        default = reduce(getattr, key.split("."), cfg)
        value = drawn.choice(NONSENSE[type(default)])
        if key == "SEED":  # below 0 is a random one
            value = "10000000000000000000000"
        with pytest.raises(ValueError) as error:
            cfg_of_case = load_config(pairs["retinanet"], [*base, key, value])
            check_config(cfg_of_case)
            register_datasets(cfg_of_case, "RetinaNet")
        assert names(str(error.value), f".{key}"), (key, value, str(error.value))
