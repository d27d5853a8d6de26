"""Conformance tests that every distillation head must pass, d2kd's own and users'."""

from .suite import conformance

__all__ = ["conformance"]
