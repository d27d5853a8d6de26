from .parallel import launch
from .run import evaluate, train
from .trainer import Trainer

__all__ = ["Trainer", "evaluate", "launch", "train"]
