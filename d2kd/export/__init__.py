"""Export a student as plain weights and a stock YAML, and verify that it runs without d2kd."""

from .student import export_student, stock_config, why_no_yaml
from .verify import verify

__all__ = [k for k in globals().keys() if not k.startswith("_")]
