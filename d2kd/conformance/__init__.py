"""A conformance kit: what every distillation head must pass, one of d2kd's or one of a user's."""

from .suite import conformance

__all__ = ["conformance"]
