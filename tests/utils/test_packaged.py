"""d2kd's own configs are found from any folder; a file in the working folder comes first."""

from pathlib import Path

import pytest

from d2kd import load_config
from d2kd.teacher import resolve_teacher
from d2kd.utils.packaged import find_file
from tests.helpers.toys import ROOT

CONFIGS = Path(ROOT) / "configs"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["quickstart/cwd.yaml", "configs/quickstart/cwd.yaml"])
def test_config_and_what_it_names_are_found(name: str) -> None:
    cfg = load_config(name)
    assert cfg.DISTILL.HEADS == ["CWD"] and cfg.MODEL.FPN.OUT_CHANNELS == 64, "its _BASE_ too"
    found = [Path(x) for x in resolve_teacher(cfg)]
    assert found == [CONFIGS / "quickstart" / x for x in ("teacher.yaml", "teacher.pth")]


@pytest.mark.parametrize("base", ["quickstart/cwd.yaml", "configs/quickstart/cwd.yaml"])
def test_yaml_of_a_user_builds_on_one_of_them(base: str) -> None:
    Path("run.yaml").write_text(f"_BASE_: {base}\nSEED: 7\n")
    cfg = load_config("run.yaml")
    assert cfg.SEED == 7 and cfg.DISTILL.HEADS == ["CWD"]


def test_file_in_the_working_folder_comes_first() -> None:
    Path("quickstart").mkdir()
    Path("quickstart/cwd.yaml").write_text("SEED: 7\n")
    assert load_config("quickstart/cwd.yaml").SEED == 7
    Path("run.yaml").write_text("_BASE_: quickstart/cwd.yaml\n")
    assert load_config("run.yaml").DISTILL.HEADS == []


@pytest.mark.parametrize(
    "path",
    ["", "nowhere.yaml", "quickstart", "../setup.py", "configs/../../setup.py", "https://x/a.yaml"],
)
def test_others_stay_what_they_are(path: str) -> None:
    assert find_file(path) == path
