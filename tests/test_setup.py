"""What d2kd imports is what setup.py asks for."""

import ast
import re
import runpy
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, Set

import pytest
import setuptools

from toys import ROOT

# Names of imports whose packages are called otherwise.
PACKAGES = {"jinja2": "Jinja2", "cv2": "opencv-python-headless", "PIL": "Pillow", "yaml": "PyYAML"}
# See the comment in setup.py; and what Detectron2 itself asks for, to draw and for TensorBoard.
NOT_NAMED = {
    "d2kd": {"detectron2", "d2kd_cli", "matplotlib", "tensorboard"},
    "tools": {"detectron2", "d2kd", "d2kd_cli", "matplotlib"},
}


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> Dict[str, Any]:
    """What setup.py hands to setuptools."""
    found: Dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **values: found.update(values))
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    return found


def imports(folder: str) -> Iterator[str]:
    """First names of all absolute imports, also those inside functions."""
    for path in (Path(ROOT) / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [x.name for x in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            yield from (name.split(".")[0] for name in names)


def names_of(requirements: Any) -> Set[str]:
    return {re.match(r"[\w-]+", x).group() for x in requirements}


@pytest.mark.skipif(sys.version_info < (3, 10), reason="Python 3.9 does not list its modules")
@pytest.mark.parametrize("folder", NOT_NAMED)
def test_what_is_imported_is_declared(folder: str, declared: Dict[str, Any]) -> None:
    beside = {x.stem for x in (Path(ROOT) / folder).glob("*.py")}
    third_party = set(imports(folder)) - set(sys.stdlib_module_names) - beside - NOT_NAMED[folder]
    needed = {PACKAGES.get(x, x) for x in third_party}
    extras = set().union(*map(names_of, declared["extras_require"].values()))
    assert len(needed) > 3
    assert needed - names_of(declared["install_requires"]) - extras == set()


def test_versions_that_fail_without_info_are_left_out(declared: Dict[str, Any]) -> None:
    requirements = pytest.importorskip("packaging.requirements")
    wanted = [x for x in declared["install_requires"] if x.startswith("pycocotools")]
    versions = requirements.Requirement(wanted[0]).specifier
    assert [x for x in ("2.0.2", "2.0.8", "2.0.9", "2.0.10", "2.0.11") if x in versions] == [
        "2.0.2",
        "2.0.8",
        "2.0.11",
    ]


def test_wheel_has_every_config_and_the_command(declared: Dict[str, Any]) -> None:
    assert declared["package_dir"] == {"d2kd.configs": "configs"}
    assert "d2kd.configs" in declared["packages"] and "d2kd.cli" in declared["packages"]
    folder = Path(ROOT) / "configs"
    packed = {x for p in declared["package_data"]["d2kd.configs"] for x in folder.glob(p)}
    assert packed == {x for x in folder.rglob("*") if x.is_file()} and len(packed) > 70
    assert declared["py_modules"] == ["d2kd_cli"]
    assert declared["entry_points"] == {"console_scripts": ["d2kd = d2kd_cli:main"]}
