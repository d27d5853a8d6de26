"""The frozen teacher: built from its config and weights, and run as its options say."""

from .build import Teacher, build_teacher, resolve_teacher
from .options import TeacherOptions

__all__ = ["Teacher", "TeacherOptions", "build_teacher", "resolve_teacher"]
