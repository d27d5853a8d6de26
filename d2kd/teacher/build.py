"""Build the frozen teacher from a config file and weights, and refuse one that is not whole."""

import logging
import os
import re
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ContextManager, Dict, List, Optional, Set, Tuple

import torch
from omegaconf import OmegaConf
from torch import nn

from detectron2.config import CfgNode, LazyConfig, instantiate

from ..checkpoint import check_is_file, load_whole_detector
from ..config import load_config, merge_opts
from ..config.unread import refuse_unread_by_teacher
from ..data.class_names import class_names, coco_json_files, names_in_sets
from ..modeling.backbone_teacher import build_backbone_teacher
from ..modeling.build import build_detector
from ..modeling.trainable import check_teaches
from ..utils.packaged import find_file
from .compiled import CompiledBackbone
from .manifest import identity, make_manifest
from .options import TeacherOptions
from .square_pad import check_images_fit

logger = logging.getLogger(__name__)

# The model, its channel order, its config as text, the names of its classes, its config if a YAML.
Built = Tuple[nn.Module, str, str, Tuple[str, ...], Optional[CfgNode]]


@dataclass
class Teacher:
    """
    A frozen detector with what is needed to feed it and to recognise it again.

    `image_format`: channel order of its input, "BGR" or "RGB"; `manifest`: its config as text and
    the sha256 of its weights, saved with every checkpoint of the student; `class_names`: those that
    its config tells, () where it does not; `options`: how it is to be run (see speed_up). Then
    `dtype` is what it runs in, None for what the student runs in, and `compiled` its compiled
    backbone.
    """

    model: nn.Module
    image_format: str
    manifest: Dict[str, str]
    class_names: Tuple[str, ...] = ()
    options: TeacherOptions = TeacherOptions()
    dtype: Optional[torch.dtype] = None
    compiled: Optional[CompiledBackbone] = None

    def batch(self, batched_inputs: List[Dict[str, Any]], image_format: str) -> List[Dict]:
        """
        The student's raw batch in the teacher's channel order.

        Mean, deviation and padding are left to the teacher's own preprocess_image, which expects
        its channels in the right order already.

        Args:
            batched_inputs: as the data loader gave it, "image" (3, H, W) in `image_format`
        """
        if image_format == self.image_format:
            return batched_inputs
        return [{**x, "image": x["image"].flip(0)} for x in batched_inputs]

    def autocast(self) -> ContextManager:
        """What its modules are called in, whatever the student's mixed precision is."""
        if self.dtype is None:
            return nullcontext()
        if self.dtype == torch.float32:
            return torch.autocast(self.model.device.type, enabled=False)
        return torch.autocast(self.model.device.type, dtype=self.dtype)


def build_teacher(cfg: CfgNode) -> Teacher:
    """
    Build the teacher that DISTILL.TEACHER names, with all its weights, in eval mode, frozen.

    Its config is a node of its own: nothing of it reaches the student's, nor the other way round.

    Raises:
        ValueError, FileNotFoundError: config or weights missing, not readable, or not covering
            every parameter and buffer of the teacher
    """
    config_file, weights = resolve_teacher(cfg)
    opts, options = list(cfg.DISTILL.TEACHER.OPTS), TeacherOptions.from_config(cfg)
    device = options.device or cfg.MODEL.DEVICE
    if cfg.DISTILL.TEACHER.BACKBONE:
        built = _from_timm(cfg, device)
    else:
        build = _from_lazy_config if config_file.endswith(".py") else _from_yaml
        built = build(config_file, opts, device)
    model, image_format, text, names, own_cfg = built
    if own_cfg and not (names or cfg.DISTILL.TEACHER.CLASSES):
        _warn_unnamed(config_file, own_cfg)
    _check_format(image_format, cfg.INPUT.FORMAT)
    check_images_fit(model, cfg)
    if weights:
        load_whole_detector(model, weights, "DISTILL.TEACHER.WEIGHTS", own_cfg)
    else:
        logger.warning("DISTILL.TEACHER.ALLOW_RANDOM_WEIGHTS: this teacher knows nothing.")
    model.eval().requires_grad_(False)
    return Teacher(model, image_format, make_manifest(text, weights), names, options)


def resolve_teacher(cfg: CfgNode) -> Tuple[str, str]:
    """
    Find the teacher's files without building anything.

    Returns:
        path of the config file, "" of a BACKBONE; path or URL of the weights, "" only where random
        ones are allowed
    """
    node = cfg.DISTILL.TEACHER
    if node.BACKBONE and node.CONFIG_FILE:
        raise ValueError(
            f"DISTILL.TEACHER.BACKBONE is {node.BACKBONE!r} and CONFIG_FILE {node.CONFIG_FILE!r}: "
            "a teacher is one or the other. Leave one of them empty."
        )
    if not (node.CONFIG_FILE or node.BACKBONE):
        raise ValueError(
            "DISTILL.TEACHER.CONFIG_FILE is empty: name the teacher's YAML or LazyConfig .py, or a "
            "model-zoo config such as COCO-Detection/retinanet_R_101_FPN_3x.yaml."
        )
    config_file, zoo_weights = find_file(node.CONFIG_FILE), ""
    if config_file and not os.path.isfile(config_file):
        config_file, zoo_weights = _from_model_zoo(node.CONFIG_FILE)
    if node.ALLOW_RANDOM_WEIGHTS:
        return config_file, find_file(node.WEIGHTS)
    weights = find_file(node.WEIGHTS) or zoo_weights
    if not weights and node.BACKBONE:
        raise ValueError(
            f"DISTILL.TEACHER.WEIGHTS is empty: name a file with weights of {node.BACKBONE}, or "
            "timm://NAME.TAG for those of timm's hub."
        )
    if not weights:
        raise ValueError(
            "DISTILL.TEACHER.WEIGHTS is empty: a teacher without weights knows nothing. Give the "
            f"path of a checkpoint of {node.CONFIG_FILE}. (MODEL.WEIGHTS in that file is not used: "
            "it usually names an ImageNet backbone.)"
        )
    if "://" not in weights:
        check_is_file(weights, "DISTILL.TEACHER.WEIGHTS")
    return config_file, weights


def _from_model_zoo(name: str) -> Tuple[str, str]:
    """Path of a zoo config and the URL of its checkpoint, "" if it has none."""
    # Not at the top: upstream's newest needs pkg_resources here, which recent setuptools lack.
    from detectron2 import model_zoo

    try:
        config_file = model_zoo.get_config_file(name)
        if not os.path.isfile(config_file):
            raise RuntimeError
    except RuntimeError:
        raise FileNotFoundError(
            f"DISTILL.TEACHER.CONFIG_FILE: {name!r} is neither a file nor a config of Detectron2's "
            "model zoo."
        ) from None
    try:
        return config_file, model_zoo.get_checkpoint_url(name) or ""
    except RuntimeError:
        return config_file, ""


def _from_timm(cfg: CfgNode, device: str) -> Built:
    node = cfg.DISTILL.TEACHER
    model = build_backbone_teacher(node.BACKBONE, node.BACKBONE_STRIDES).to(device)
    text = f"timm {node.BACKBONE}, strides {list(node.BACKBONE_STRIDES)}"
    return model, "RGB", text, (), None


def _from_yaml(path: str, opts: List[Any], device: str) -> Built:
    cfg = load_config(path)
    merge_opts(cfg, opts, "DISTILL.TEACHER.OPTS")
    if cfg.MODEL.META_ARCHITECTURE == "Distiller":
        raise ValueError(
            f"DISTILL.TEACHER.CONFIG_FILE: {path!r} is itself a distillation run. Name a config of "
            "a plain detector; for the student of that run set DISTILL.TEACHER.OPTS "
            f"\"['MODEL.META_ARCHITECTURE', '{cfg.DISTILL.STUDENT_META_ARCHITECTURE}']\"."
        )
    refuse_unread_by_teacher(cfg, opts)
    cfg.MODEL.DEVICE = device
    source = f"DISTILL.TEACHER.CONFIG_FILE: {path!r} with DISTILL.TEACHER.OPTS"
    check_teaches(cfg, source)
    model = build_detector(cfg, source)
    return model, cfg.INPUT.FORMAT, identity(cfg), class_names(cfg), cfg


def _from_lazy_config(path: str, opts: List[Any], device: str) -> Built:
    try:
        _refuse_training_keys(opts)
        cfg = LazyConfig.load(path)
        known = _targets(cfg.model)
        cfg = LazyConfig.apply_overrides(cfg, [str(x) for x in opts])
        _check_targets(path, known, _targets(cfg.model))
        model = instantiate(cfg.model).to(device)
    except Exception as error:  # the file is Python
        raise ValueError(
            f"DISTILL.TEACHER.CONFIG_FILE: no detector can be built from {path!r} with "
            f"DISTILL.TEACHER.OPTS: {type(error).__name__}: {error}{_package_to_install(error)}"
        ) from error
    image_format = "BGR"  # Detectron2's default, also for the model's `input_format`
    if "dataloader" in cfg:
        image_format = cfg.dataloader.train.mapper.get("image_format", image_format)
    # A function in it is printed with its address in memory, which no two processes share.
    text = re.sub(r" at 0x[0-9a-f]+", "", str(cfg.model))
    datasets = OmegaConf.select(cfg, "dataloader.train.dataset.names") or ()
    names = names_in_sets([datasets] if isinstance(datasets, str) else datasets)
    return model, cfg.model.get("input_format") or image_format, text, names, None


def _package_to_install(error: Exception) -> str:
    """Upstream's ViT and MViT import timm and fairscale, which Detectron2 does not ask for."""
    missing = (getattr(error, "name", None) or "").partition(".")[0]
    is_another = isinstance(error, ModuleNotFoundError) and missing not in ("", "detectron2")
    return f". Run `pip install {missing}`." if is_another else ""


def _refuse_training_keys(opts: List[Any]) -> None:
    """Of a LazyConfig."""
    for key in (re.split("[=@]", str(x))[0].lstrip("+~") for x in opts):
        if key.split(".")[0] in ("train", "optimizer", "lr_multiplier"):
            raise ValueError(
                f"{key} would have no effect: a teacher is not trained, and "
                "DISTILL.TEACHER.WEIGHTS names its weights"
            )


def _check_targets(path: str, known: Set[str], wanted: Set[str]) -> None:
    """Whatever an override names would be called: a YAML could run any code."""
    added = sorted(wanted - known)
    if added:
        raise ValueError(
            f"DISTILL.TEACHER.OPTS builds the teacher with {added[0]}, which {path!r} does not "
            "name. Overrides may change values; what is called is for the LazyConfig to say."
        )


def _targets(tree: Any) -> Set[str]:
    """What instantiate() would call, by name."""
    if OmegaConf.is_config(tree):
        tree = OmegaConf.to_container(tree, resolve=True)
    if isinstance(tree, (list, tuple)):
        return set().union(*map(_targets, tree))
    if not isinstance(tree, dict):
        return set()
    found = set().union(*map(_targets, tree.values()))
    target = tree.get("_target_", "")
    name = target if isinstance(target, str) else f"{target.__module__}.{target.__qualname__}"
    return found | {name}


def _warn_unnamed(path: str, cfg: CfgNode) -> None:
    lost = [x for x in coco_json_files(cfg).values() if not os.path.isfile(x)]
    if lost:
        logger.warning(
            f"DISTILL.TEACHER.CONFIG_FILE: {path!r} names its classes in {lost[0]!r}, which is not "
            "there: class i of the teacher is taken for class i of the student. "
            "DISTILL.TEACHER.CLASSES can list them."
        )


def _check_format(teacher: str, student: str) -> None:
    if teacher != student and {teacher, student} != {"BGR", "RGB"}:
        raise ValueError(
            f"INPUT.FORMAT: the teacher wants {teacher!r}, the student {student!r}. d2kd can only "
            "turn BGR into RGB and back; read images for the student as one of the two."
        )
