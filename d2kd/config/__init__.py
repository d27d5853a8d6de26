from .distill_keys import add_distill_config
from .load import leaves, load_config, merge_mapping, merge_opts, student_config

__all__ = [
    "add_distill_config",
    "leaves",
    "load_config",
    "merge_mapping",
    "merge_opts",
    "student_config",
]
