"""The frozen teacher: built from its config and weights, and run as cheaply as its options allow."""

from .build import Teacher, build_teacher, resolve_teacher
from .options import TeacherOptions

__all__ = ["Teacher", "TeacherOptions", "build_teacher", "resolve_teacher"]
