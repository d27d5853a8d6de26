"""The builder in third_party/detectron2, without a network and without Detectron2's sources."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

BUILDER = Path(__file__).parent.parent / "third_party" / "detectron2"


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BUILDER))
    return importlib.import_module("d2_backend")


@pytest.fixture
def edits(backend: ModuleType) -> ModuleType:
    return importlib.import_module("d2_edits")


def test_edits_replace_and_mark_each_file_once(edits: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = np.int(np.int(1))\ny = np.str\n")
    table = [
        edits.Edit("why", "a.py", "np.int", "int", 2),
        edits.Edit("why", "a.py", "np.str", "str"),
    ]
    edits.apply_edits(tmp_path, table)
    assert (tmp_path / "a.py").read_text() == edits.NOTICE + "x = int(int(1))\ny = str\n"


@pytest.mark.parametrize("text, found", [("", 0), ("np.int np.int", 2)])
def test_edit_that_does_not_match_its_count_stops_the_build(
    edits: ModuleType, tmp_path: Path, text: str, found: int
) -> None:
    (tmp_path / "a.py").write_text(text)
    with pytest.raises(edits.BuildError, match=f"a.py: expected 'np.int' 1 x, found {found} x"):
        edits.apply_edits(tmp_path, [edits.Edit("why", "a.py", "np.int", "int")])
    assert (tmp_path / "a.py").read_text() == text


def test_every_edit_is_described(edits: ModuleType) -> None:
    lines = [x for x in edits.describe(edits.EDITS, "x==1").splitlines() if x.startswith("- ")]
    assert len(lines) == len(edits.EDITS)
    assert all(e.file in x and repr(e.new) in x for e, x in zip(edits.EDITS, lines))


def test_tampered_or_missing_sdist_is_refused(backend: ModuleType, tmp_path: Path) -> None:
    sdist = tmp_path / "detectron2_cdo-0.5.tar.gz"
    with pytest.raises(backend.BuildError, match="is not a file"):
        backend.unpack(sdist, tmp_path)
    sdist.write_bytes(b"tampered")
    with pytest.raises(backend.BuildError, match="is refused: its sha256 is"):
        backend.unpack(sdist, tmp_path)
    assert list(tmp_path.iterdir()) == [sdist], "nothing may be unpacked"


def test_own_copy_of_the_sdist_is_used(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_SDIST", str(tmp_path / "mine.tar.gz"))
    assert backend.fetch(tmp_path) == tmp_path / "mine.tar.gz"


def test_pip_configuration_has_pips_precedence(backend: ModuleType) -> None:
    listing = "\n".join(
        [
            ":env:.find-links='/env'",
            "download.index-url='https://other.command'",
            "global.extra-index-url='\\nhttps://a/simple\\nhttps://b/simple'",
            "global.find-links='/global'",
            "global.index-url='https://user:p=w@global/simple'",
            "global.timeout='60'",
            "install.find-links='/install'",
            "install.trusted-host='b'",
        ]
    )
    options = backend.parse_pip_config(listing)
    assert options["find-links"] == "/env"
    assert options["index-url"] == "https://user:p=w@global/simple"
    assert options["extra-index-url"].split() == ["https://a/simple", "https://b/simple"]
    assert options["trusted-host"] == "b"


def test_variables_stand_in_for_pip(backend: ModuleType) -> None:
    environ = {
        "PIP_INDEX_URL": "https://pip/simple?key=1",
        "UV_INDEX_URL": "https://uv/simple",
        "UV_INDEX": "mine=https://a/simple https://b/simple",
        "UV_FIND_LINKS": "/x,/y",
        "PIP_NO_INDEX": "",
    }
    assert backend.read_variables(environ) == {
        "index-url": "https://pip/simple?key=1",
        "extra-index-url": "https://a/simple https://b/simple",
        "find-links": "/x /y",
    }


def test_unreachable_index_names_the_remedy(
    backend: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("unearth", reason="only the build sandbox has unearth")
    monkeypatch.delenv("DETECTRON2_SDIST", raising=False)
    closed_port = {"index-url": "http://127.0.0.1:9/simple"}
    monkeypatch.setattr(backend, "index_options", lambda: closed_port)
    with pytest.raises(backend.BuildError, match="Set DETECTRON2_SDIST"):
        backend.fetch(tmp_path)


def test_missing_operator_is_named_when_used(backend: ModuleType) -> None:
    operators = importlib.import_module("no_ext")._C
    assert not hasattr(operators, "__wrapped__"), "tools that inspect modules must not trip over it"
    with pytest.raises(ImportError, match="'box_iou_rotated' is one of them"):
        operators.box_iou_rotated
