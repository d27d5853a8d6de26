from .class_names import class_names
from .coco_format import register_datasets
from .data_keys import add_data_config
from .loader import ResumableLoader, build_train_loader
from .shapes import make_shapes

__all__ = [
    "ResumableLoader",
    "add_data_config",
    "build_train_loader",
    "class_names",
    "make_shapes",
    "register_datasets",
]
