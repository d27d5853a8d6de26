"""Tools that are started by their path end as the commands of d2kd do."""

import runpy
import sys
from pathlib import Path
from typing import List

import pytest

from d2kd.utils.user_mistakes import TOOLS


@pytest.mark.parametrize(
    "words, said",
    [
        (["bench_tables.py", "--root", "FOLDER"], "has no <!-- /bench --> behind it."),
        (["benchmark.py", "--config-file", "FOLDER/none.yaml"], "none.yaml' does not exist"),
        (["choose_classes.py", "--classes"], "--classes: expected at least one argument"),
        (["shrink_checkpoint.py", "--traceback", "a.pth"], "required: target"),
    ],
)
def test_mistake_of_the_user_s_is_one_line_and_exit_code_2(
    words: List[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "README.md").write_text("<!-- bench:heads -->\n")
    words = [x.replace("FOLDER", str(tmp_path)) for x in words]
    monkeypatch.setattr(sys, "argv", [str(TOOLS / words[0]), *words[1:]])
    monkeypatch.syspath_prepend(TOOLS)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(sys.argv[0], run_name="__main__")
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and line.startswith(f"{words[0]}: error: ") and said in line
