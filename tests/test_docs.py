"""The documents: their links, their generated parts, and the log lines that they quote."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import List, Set, Tuple

import pytest

from detectron2.config import get_cfg

from d2kd.config.distill_keys import add_distill_config
from d2kd.config.load import leaves, load_config
from tests.helpers.toys import ROOT

README = Path(ROOT, "README.md")
DOCUMENTS = [
    README,
    Path(ROOT, "CONTRIBUTING.md"),
    Path(ROOT, "MODEL_ZOO.md"),
    Path(ROOT, "CHANGELOG.md"),
]
DOCUMENTS += sorted(Path(ROOT, "docs").glob("*.md"))
NAMES = [str(x.relative_to(ROOT)) for x in DOCUMENTS]


def prose(path: Path) -> str:
    """A document without its code."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ {4,}.*$", "", text, flags=re.MULTILINE))


def links_of(path: Path) -> List[Tuple[Path, str]]:
    """(file, anchor) of each link that does not leave the repository."""
    text = re.sub(r"\s+", " ", prose(path))
    targets = [x for x in re.findall(r"\]\(([^)\s]+)\)", text) if not x.startswith("http")]
    parts = [x.partition("#") for x in targets]
    return [((path.parent / x).resolve() if x else path, anchor) for x, _, anchor in parts]


def anchors_of(path: Path) -> Set[str]:
    """As GitHub derives them from headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in headings}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for target, anchor in links_of(Path(ROOT, name)):
        assert target.is_file(), target
        assert not anchor or anchor in anchors_of(target), f"{target}#{anchor}"


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [README]
    while waiting:
        path = waiting.pop()
        if path not in reached and path.suffix == ".md":
            reached.add(path)
            waiting += [target for target, _ in links_of(path)]
    assert reached == {x.resolve() for x in DOCUMENTS}


def test_readme_is_short() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 132


def test_teacher_that_own_data_trains_is_the_one_of_the_readmes_student(tmp_path: Path) -> None:
    configs = []
    for document in (Path(ROOT, "docs", "own_data.md"), README):
        block = re.search(r"```yaml\n(.*?)```", document.read_text(), re.DOTALL)[1]
        (tmp_path / "run.yaml").write_text(block)
        configs.append(load_config(str(tmp_path / "run.yaml")))
    teacher, student = configs
    assert teacher.MODEL.META_ARCHITECTURE == student.DISTILL.STUDENT_META_ARCHITECTURE
    assert f"{teacher.OUTPUT_DIR}/config.yaml" == student.DISTILL.TEACHER.CONFIG_FILE
    assert teacher.DATASETS == student.DATASETS
    assert teacher.MODEL.RETINANET.NUM_CLASSES == student.MODEL.RETINANET.NUM_CLASSES


def test_generated_parts_are_what_the_code_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(ROOT, "dev"))
    script = runpy.run_path(str(Path(ROOT, "dev", "write_docs.py")))
    for path, text in script["documents"]().items():
        assert path.read_text() == text, f"{path}: run python dev/write_docs.py"


def test_every_key_is_listed() -> None:
    theirs, ours = get_cfg(), get_cfg()
    add_distill_config(ours)
    added = dict(leaves(ours)).keys() - dict(leaves(theirs)).keys()
    added = {re.sub(r"DISTILL\.\w+\.SCHEDULE", "DISTILL.<HEAD>.SCHEDULE", x) for x in added}
    listed = re.findall(r"^\| `([^`]+)`", Path(ROOT, "docs", "keys.md").read_text(), re.MULTILINE)
    assert len(listed) == len(set(listed)) and set(listed) == added


def quoted() -> List[str]:
    """Log lines in the checklist: what is in code there and has three words or more."""
    text = re.sub(r"\s+", " ", Path(ROOT, "docs", "no_gain.md").read_text())
    return [x for x in re.findall(r"`([^`]+)`", text) if len(x.split()) > 2]


@pytest.mark.parametrize("line", quoted())
def test_log_lines_of_the_checklist_are_in_the_code(line: str) -> None:
    sources = "\n".join(x.read_text() for x in Path(ROOT, "d2kd").rglob("*.py"))
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)  # neighbouring literals are one text
    parts = re.split(r"'?\.\.\.'?|\b[\d.]+\b", line)  # between what an f-string fills in
    assert re.search("[^\n]*?".join(map(re.escape, parts)), sources)


@pytest.mark.process
def test_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs mkdocs-material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*command, "--site-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for path in tmp_path.rglob("index.html"):
        article = re.search(r"<article.*?</article>", path.read_text(), re.DOTALL)[0]
        shown = re.sub(r"<pre.*?</pre>", "", article, flags=re.DOTALL)
        # A list or a table that GitHub makes of the same lines.
        assert not re.search(r"^ *(?:\* |- |\d\. |\| )", shown, re.MULTILINE), path
