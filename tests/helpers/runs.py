"""Tiny training runs that the integration tests share: a toy student on a few built-in shapes."""

import copy
from pathlib import Path
from typing import Any, Dict, Iterable, List, Sequence

import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.engine import HookBase

from d2kd.data import register_datasets
from d2kd.data.outlines import CLASSES
from d2kd.engine import Trainer

from .forks import launch_two
from .toys import detector_config, distill_config

SHAPES_CLASSES = len(CLASSES)


def run_config(
    folder: Any,
    teacher_opts: Sequence[Any] = (),
    heads: Sequence[str] = ("MGD",),
    student: str = "retinanet",
    **overrides: Any,
) -> CfgNode:
    """
    Config of a run of 4 iterations on 8 images of 64 x 64 pixels, without evaluation.

    Args:
        folder: receives the data (shared by all runs there) and, under "run", the output
        teacher_opts: of write_teacher; empty: a plain student
        overrides: as in detector_config
    """
    values = {
        "OUTPUT_DIR": f"{folder}/run",
        "DATASETS__SHAPES__ROOT": str(folder),
        "DATASETS__SHAPES__NUM_TRAIN": 8,
        "DATASETS__SHAPES__NUM_VAL": 4,
        "DATASETS__SHAPES__IMAGE_SIZE": 64,
        "DATASETS__TRAIN": ("d2kd_shapes_train",),
        "DATASETS__TEST": (),
        "DATALOADER__NUM_WORKERS": 0,
        "MODEL__RETINANET__NUM_CLASSES": SHAPES_CLASSES,
        "MODEL__RETINANET__NORM": "",  # p6 and p7 are single cells, too little for 32 groups
        "MODEL__ROI_HEADS__NUM_CLASSES": SHAPES_CLASSES,
        "SOLVER__IMS_PER_BATCH": 2,
        "SOLVER__BASE_LR": 0.002,
        "SOLVER__WARMUP_ITERS": 2,
        "SOLVER__STEPS": (3,),
        "SOLVER__MAX_ITER": 4,
        "SOLVER__CHECKPOINT_PERIOD": 2,
        **overrides,
    }
    if not teacher_opts:
        return detector_config(student, **values)
    values.setdefault("DISTILL__TEACHER__EVAL_IMAGES", 0)  # toy teachers know nothing
    return distill_config(student, teacher_opts, heads, **values)


def at(cfg: CfgNode, folder: Path, name: str) -> CfgNode:
    """The same run with the output in another place."""
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = str(folder / name)
    return cfg


def saved(cfg: CfgNode, name: str = "model_final.pth") -> Dict[str, Any]:
    """A checkpoint of a run."""
    return torch.load(Path(cfg.OUTPUT_DIR) / name, weights_only=True)


def build_trainer(cfg: CfgNode, resume: bool = False) -> Trainer:
    """A Trainer that is ready for train()."""
    register_datasets(cfg, "")
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume)
    return trainer


def run(cfg: CfgNode, *hooks: HookBase, resume: bool = False) -> Trainer:
    """Train to the end, or until a hook raises."""
    trainer = build_trainer(cfg, resume)
    trainer.register_hooks(hooks)
    trainer.train()
    return trainer


def interrupt(cfg: CfgNode, iteration: int) -> Trainer:
    """A run that dies in the given iteration, after its optimizer step and before its save."""
    trainer = build_trainer(cfg)
    trainer.register_hooks([Interrupt(iteration)])
    trainer._hooks.insert(0, trainer._hooks.pop())
    try:
        trainer.train()
    except Interruption:
        return trainer
    raise AssertionError(f"the run was not interrupted in iteration {iteration}")


class Interruption(Exception):
    pass


class Interrupt(HookBase):
    def __init__(self, iteration: int):
        self.iteration = iteration

    def after_step(self) -> None:
        if self.trainer.iter == self.iteration:
            raise Interruption


class RecordBatches(HookBase):
    """Keeps the batches that the model was given."""

    def __init__(self) -> None:
        self.batches: List[List[Dict[str, Any]]] = []

    def before_train(self) -> None:
        self.handle = self.trainer.model.register_forward_pre_hook(
            lambda module, inputs: self.batches.append(inputs[0])
        )

    def after_train(self) -> None:
        self.handle.remove()


def scalars(trainer: Trainer) -> Dict[str, Dict[int, float]]:
    """Losses, weights and learning rates of a run: name to {iteration: value}."""
    histories = trainer.storage.histories()
    kept = [k for k in histories if "loss" in k or k == "lr" or k.endswith("/weight")]
    return {k: {int(i): v for v, i in histories[k].values()} for k in kept}


def assert_same_tensors(actual: Dict[str, Any], expected: Dict[str, Any]) -> None:
    """Two state dicts agree bit for bit."""
    assert list(actual) == list(expected)
    different = [k for k in expected if not _same(actual[k], expected[k])]
    assert not different, f"{len(different)} of {len(expected)} differ, such as {different[:3]}"


def _same(actual: Any, expected: Any) -> bool:
    """Of a tensor, or of a head's extra state: a dict of tensors and numbers."""
    if isinstance(expected, dict):
        return list(actual) == list(expected) and all(_same(actual[k], expected[k]) for k in actual)
    if isinstance(expected, torch.Tensor):
        return torch.equal(actual, expected)
    return actual == expected


def assert_same_checkpoint(actual: Dict[str, Any], expected: Dict[str, Any]) -> None:
    """Student, heads and optimizer of two checkpoints agree bit for bit."""
    for part in ("model", "distill_heads"):
        assert_same_tensors(actual[part], expected[part])
    ours, theirs = (list(tensors_in(x["trainer"]["_trainer"])) for x in (actual, expected))
    assert len(ours) == len(theirs) > 50
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def tensors_in(tree: Any) -> Iterable[torch.Tensor]:
    """All tensors in nested dicts and lists."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors_in(value)
    elif isinstance(tree, (list, tuple)):
        for value in tree:
            yield from tensors_in(value)


def assert_two_train_as_one(cfg: CfgNode) -> None:
    """Two processes train the student that one does, but for rounding."""
    run(cfg)
    expected = saved(cfg)["model"]
    cfg.OUTPUT_DIR += "_two"
    launch_two(run, cfg)
    found = saved(cfg)["model"]
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6, msg=key)


def snapshot(module: nn.Module) -> Dict[str, Any]:
    return copy.deepcopy(module.state_dict())
