"""Hand over a student: plain weights and a stock YAML, and a proof that they need no d2kd."""

from .student import export_student, stock_config, why_no_yaml
from .verify import verify

__all__ = [k for k in globals().keys() if not k.startswith("_")]
