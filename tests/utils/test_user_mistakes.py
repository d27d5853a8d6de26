"""What is told in one line, and what keeps its traceback."""

from typing import Any, Callable

import pytest

from detectron2.engine import HookBase

from d2kd.utils.checks import check_choice
from d2kd.utils.user_mistakes import is_users_mistake, one_line, run_command
from tests.helpers.runs import run, run_config

WRONG = ("SOLVER.SPEED", "fast", ("slow", "steady"))
TOLD = "SOLVER.SPEED must be one of slow, steady, got 'fast'."


def caught(function: Callable[[], Any]) -> Exception:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def code_of(module: str, body: str) -> Callable[[], Any]:
    """A function that stands in a module of this name."""
    names = {"__name__": module}
    exec(f"def function():\n    {body}", names)
    return names["function"]


@pytest.mark.parametrize(
    "module, body, expected",
    [
        ("d2kd.data.x", "raise ValueError('x')", True),
        ("d2kd.data.x", "raise FileNotFoundError('x')", True),
        ("d2kd.export.x", "raise ImportError('onnx is not installed')", True),
        ("__main__", "raise ValueError('x')", True),
        ("d2kd.data.x", "raise RuntimeError('x')", False),
        ("d2kd.data.x", "raise KeyError('x')", False),
        ("d2kd.data.x", "int('x')", False),
        ("d2kd.data.x", "open('/no/such/file')", False),
        ("d2kd.data.x", "import no_such_package", False),
        ("torch.nn", "raise ValueError('x')", False),
        ("d2kd_plugin_my_head_12345678", "raise ValueError('x')", False),
    ],
)
def test_origin_decides(module: str, body: str, expected: bool) -> None:
    assert is_users_mistake(caught(code_of(module, body))) == expected


class WrongInAStep(HookBase):
    def before_step(self) -> None:
        check_choice(*WRONG)


class WrongInTheStudent(HookBase):
    def before_train(self) -> None:
        self.trainer.model.register_forward_hook(lambda *_: check_choice(*WRONG))


@pytest.mark.parametrize("hook", [WrongInAStep, WrongInTheStudent])
def test_training_step_keeps_its_traceback(hook: type, tmp_path: Any) -> None:
    error = caught(lambda: run(run_config(tmp_path), hook()))
    assert str(error) == TOLD and not is_users_mistake(error)


def test_command_ends_with_its_own_code_or_2(capsys: pytest.CaptureFixture) -> None:
    assert run_command("d2kd x", lambda argv: None, []) == 0
    assert run_command("d2kd x", lambda argv: 1, []) == 1
    assert run_command("d2kd x", lambda argv: check_choice(*WRONG), []) == 2
    assert capsys.readouterr().err == f"d2kd x: error: {TOLD}\n"
    with pytest.raises(ZeroDivisionError):
        run_command("d2kd x", lambda argv: 1 // 0, [])


def test_lists_in_messages_become_one_line() -> None:
    assert one_line(ValueError("Keys that nobody reads:\n  A.B (x)\n  C\n")) == (
        "Keys that nobody reads: A.B (x); C"
    )
    assert one_line(ValueError("It differs.\n  Take another.")) == "It differs. Take another."
