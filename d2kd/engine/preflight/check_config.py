"""All checks of a config that need no model."""

import math
import os
from fnmatch import fnmatchcase
from typing import List, Sequence

import torch
from fvcore.common.registry import Registry

from detectron2 import modeling
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

from ...config import student_config
from ...config.lessons import lesson_configs
from ...config.readers import value_of
from ...config.unread import why_unread
from ...data.unlabelled import batch_sizes, unlabelled_sets
from ...heads import head_class
from ...inherit import PARTS
from ...modeling.backbone_teacher import check_strides
from ...modeling.trainable import check_trainable
from ...schedule import WeightSchedule
from ...teacher import TeacherOptions, resolve_teacher
from ...utils.checks import check_choice, check_range, nearest
from ...utils.distils import distils
from ..optimizer import CLIP_TYPES, OPTIMIZERS
from ..stages import STAGE_LR, Stage, plan_stages, scaled_to_processes
from .evaluation_keys import check_evaluation

# Files of a run that a teacher may be read from; any run in the same folder has some of these names
WRITTEN = ("config.yaml", "model_*.pth")
# Where Detectron2 looks up the parts of a detector, which fails with a KeyError
PARTS_OF_DETECTOR = {
    "MODEL.BACKBONE.NAME": modeling.BACKBONE_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": modeling.ANCHOR_GENERATOR_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": modeling.PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.RPN.HEAD_NAME": modeling.RPN_HEAD_REGISTRY,
    "MODEL.ROI_HEADS.NAME": modeling.ROI_HEADS_REGISTRY,
    "MODEL.ROI_BOX_HEAD.NAME": modeling.ROI_BOX_HEAD_REGISTRY,
    "MODEL.ROI_MASK_HEAD.NAME": modeling.ROI_MASK_HEAD_REGISTRY,
    "MODEL.ROI_KEYPOINT_HEAD.NAME": modeling.ROI_KEYPOINT_HEAD_REGISTRY,
}
NO_PART = ("", "PrecomputedProposals")


def check_config(cfg: CfgNode, evaluation: bool = False) -> List[Stage]:
    """
    Args:
        evaluation: of a plain detector, which is not trained

    Returns:
        the stages of the run, from :func:`plan_stages`; [] of an evaluation

    Raises:
        ValueError, FileNotFoundError: naming the key, its value and what would be right
    """
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but PyTorch sees no GPU. Leave the key out to "
            "take a GPU where there is one, or set it to cpu."
        )
    check_evaluation(cfg, training=not evaluation)
    if evaluation:
        _check_registered(
            "MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, META_ARCH_REGISTRY
        )
        _check_parts(cfg)
        return []
    _check_run(cfg)
    if cfg.MODEL.META_ARCHITECTURE != "Distiller":
        _check_registered(
            "MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, META_ARCH_REGISTRY
        )
        _check_plain(cfg)
    else:
        student = cfg.DISTILL.STUDENT_META_ARCHITECTURE
        _check_registered("DISTILL.STUDENT_META_ARCHITECTURE", student, META_ARCH_REGISTRY)
    _check_parts(cfg)
    if distils(cfg):
        check_choice("DISTILL.STAGE_LR", cfg.DISTILL.STAGE_LR, STAGE_LR)
    stages = plan_stages(cfg)
    for stage in stages if distils(cfg) else ():
        with stage.in_errors():
            batch_sizes(scaled_to_processes(stage.cfg))
            unlabelled_sets(stage.cfg)
            _check_liveness(stage.cfg.DISTILL.LIVENESS)
            for lesson in lesson_configs(stage.cfg):
                with lesson.in_errors():
                    _check_lesson(lesson.cfg)
    check_trainable(student_config(cfg))
    return stages


def check_teacher_is_kept(stages: Sequence[Stage]) -> None:
    """
    Args:
        stages: of a run that begins; a student alone has no teacher

    Raises:
        ValueError: the run would write its own files over those of a teacher
    """
    for stage in (x for x in stages if distils(x.cfg)):
        folder = os.path.realpath(stage.cfg.OUTPUT_DIR)
        for lesson in lesson_configs(stage.cfg):
            for path in resolve_teacher(lesson.cfg):
                parent, name = os.path.split(os.path.realpath(path))
                if parent == folder and any(fnmatchcase(name, x) for x in WRITTEN):
                    raise ValueError(
                        f"OUTPUT_DIR {stage.cfg.OUTPUT_DIR!r} has the teacher's {name} "
                        "(DISTILL.TEACHER), over which this run would write its own. Give this "
                        "run a folder of its own."
                    )


def _check_run(cfg: CfgNode) -> None:
    """Values that Detectron2 does not check: it would fail late, or train something else."""
    if cfg.SOLVER.AMP.ENABLED and not cfg.MODEL.DEVICE.startswith("cuda"):
        raise ValueError(
            "SOLVER.AMP.ENABLED is True, which Detectron2 has for GPUs only; MODEL.DEVICE is "
            f"{cfg.MODEL.DEVICE!r}. Set it to False."
        )
    check_range("SEED", cfg.SEED, -math.inf, 2**31 - 1, "below 0 is a random one")
    check_range("VIS_PERIOD", cfg.VIS_PERIOD, 0, math.inf)
    check_range("SOLVER.MAX_ITER", cfg.SOLVER.MAX_ITER, 1, 10**9)
    for key in ("IMS_PER_BATCH", "CHECKPOINT_PERIOD"):
        check_range(f"SOLVER.{key}", cfg.SOLVER[key], 1, math.inf)
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    if reference < 0 or (reference and cfg.SOLVER.IMS_PER_BATCH % reference):
        raise ValueError(
            f"SOLVER.REFERENCE_WORLD_SIZE is {reference}, the number of processes that SOLVER is "
            f"meant for: SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} must be a multiple of it. "
            "0 scales nothing."
        )
    check_choice("SOLVER.OPTIMIZER", cfg.SOLVER.OPTIMIZER, OPTIMIZERS)
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.ENABLED:
        check_choice("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip.CLIP_TYPE, CLIP_TYPES)
        if not clip.CLIP_VALUE > 0:
            raise ValueError(
                f"SOLVER.CLIP_GRADIENTS.CLIP_VALUE must be above 0, got {clip.CLIP_VALUE}: nothing "
                "would be learnt."
            )


def _check_plain(cfg: CfgNode) -> None:
    """Training a student alone must be intended."""
    if cfg.DISTILL.HEADS and cfg.DISTILL.ENABLED:
        raise ValueError(
            f"DISTILL.HEADS is {list(cfg.DISTILL.HEADS)}, but MODEL.META_ARCHITECTURE is "
            f"{cfg.MODEL.META_ARCHITECTURE!r}, which distils nothing. Set that to Distiller and "
            "DISTILL.STUDENT_META_ARCHITECTURE to the student's, or DISTILL.ENABLED to False."
        )


def _check_parts(cfg: CfgNode) -> None:
    for key, registry in PARTS_OF_DETECTOR.items():
        name = value_of(cfg, key)
        if name not in NO_PART and not why_unread(key, cfg):
            _check_registered(key, name, registry)


def _check_registered(key: str, name: str, registry: Registry) -> None:
    known = sorted(k for k, _ in registry if k != "Distiller")
    if name not in known:
        hint = "".join(f" Did you mean {x}?" for x in nearest(name, known))
        raise ValueError(f"{key} is {name!r}; registered are {', '.join(known)}.{hint}")


def _check_lesson(cfg: CfgNode) -> None:
    if not cfg.DISTILL.HEADS:
        raise ValueError(
            "DISTILL.HEADS is empty: nothing would be distilled. Name a head, or set "
            "DISTILL.ENABLED False to train the student alone."
        )
    if len(set(map(str, cfg.DISTILL.HEADS))) < len(cfg.DISTILL.HEADS):
        raise ValueError(f"DISTILL.HEADS names a head twice: {list(cfg.DISTILL.HEADS)}.")
    for name in cfg.DISTILL.HEADS:
        head_class(name)
        WeightSchedule.from_config(name, cfg)
    for part in cfg.DISTILL.INHERIT:
        if part not in PARTS:
            raise ValueError(f"DISTILL.INHERIT has {part!r}; it may list {', '.join(PARTS)}.")
    check_range("DISTILL.TEACHER.EVAL_IMAGES", cfg.DISTILL.TEACHER.EVAL_IMAGES, 0, math.inf)
    check_range("DISTILL.TEACHER.MIN_AP", cfg.DISTILL.TEACHER.MIN_AP, 0, 100, "percent")
    TeacherOptions.from_config(cfg)
    check_strides(cfg.DISTILL.TEACHER.BACKBONE_STRIDES)
    resolve_teacher(cfg)


def _check_liveness(node: CfgNode) -> None:
    check_range("DISTILL.LIVENESS.FIRST_STEPS", node.FIRST_STEPS, 2, math.inf)
    check_range("DISTILL.LIVENESS.PERIOD", node.PERIOD, 0, math.inf, "0 is never again")
    if not 0 < node.WANTED_SHARE < 1:
        raise ValueError(
            f"DISTILL.LIVENESS.WANTED_SHARE must be in (0, 1), got {node.WANTED_SHARE}."
        )
