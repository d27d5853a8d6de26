import io
from contextlib import redirect_stdout
from typing import ContextManager


def silent() -> ContextManager:
    """For pycocotools, which prints what it does."""
    return redirect_stdout(io.StringIO())
