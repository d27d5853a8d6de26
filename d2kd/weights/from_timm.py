"""Weights of timm's models, from its hub or from a file, for the backbone of a detector."""

import importlib
import logging
import re
from typing import Any, Dict, List, Mapping, Optional, Sequence

from torch import nn

from detectron2.utils.file_io import PathHandler, PathManager

from ..modeling.backbone_teacher import ResampledBackbone
from ..modeling.timm_fpn import Images, TimmBackbone, import_timm
from ..utils.checks import shown

logger = logging.getLogger(__name__)

HUB = "timm://"


class TimmHub(PathHandler):
    """timm://mobilenetv3_large_100.ra_in1k: the weights of that name, downloaded once."""

    def _get_supported_prefixes(self) -> List[str]:
        return [HUB]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        repository = _pretrained(path)["hf_hub_id"]
        hub = importlib.import_module("huggingface_hub")  # timm needs it
        try:
            return hub.hf_hub_download(repository, "model.safetensors")
        except Exception as error:  # of several libraries
            raise OSError(
                f"{error}. Without a network, download model.safetensors of {repository} "
                "elsewhere and name that file"
            ) from error

    def _open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
        return open(self._get_local_path(path), mode)


PathManager.register_handler(TimmHub())


def named_for_detector(
    state: Mapping[str, Any], detector: nn.Module, path: str
) -> Optional[Dict[str, Any]]:
    """
    Rename the weights of a timm model as they are called in a detector with this backbone.

    Args:
        state: name to tensor, with the classifier or without
        path: where they are from

    Returns:
        those of the backbone; None if it is not timm's, or no name is of this model

    Raises:
        ValueError: some of the backbone are missing or of another shape, or its images are not
            what the weights were trained on
    """
    own = (TimmBackbone, ResampledBackbone)
    prefix, backbone = next(
        ((name, x) for name, x in detector.named_modules() if isinstance(x, own)), ("", None)
    )
    if backbone is None:
        return None
    wanted = backbone.net.state_dict()
    theirs = {_joined(k): k for k in state}
    names = {k: theirs[_joined(k)] for k in wanted if _joined(k) in theirs}
    if not names:
        return None
    _check_covers(wanted, {k: state[name] for k, name in names.items()}, path)
    pretrained = _pretrained(path) if path.startswith(HUB) else backbone.net.pretrained_cfg
    if isinstance(backbone, TimmBackbone):
        _check_images(backbone.images, pretrained, path)
    unused = sorted(set(state) - set(names.values()))
    logger.info(
        f"{path!r} has the whole backbone, {pretrained['architecture']} of timm. "
        f"Of its {len(state)} tensors {len(unused)} are not needed"
        + (f", such as {unused[0]}." if unused else ".")
    )
    return {f"{prefix}.net.{k}": state[name] for k, name in names.items()}


def _joined(name: str) -> str:
    """The same for a plain model and for all of timm's wrappers that return its features."""
    return re.sub(r"^(model|graph_module)\.", "", name).replace(".", "_")


def _pretrained(path: str) -> Dict[str, Any]:
    """timm's entry of timm://..."""
    timm, name = import_timm(path), path[len(HUB) :]
    try:
        config = timm.get_pretrained_cfg(name, allow_unregistered=False).to_dict()
    except RuntimeError:  # no such model, or no such tag of it
        config = {}
    if not config.get("hf_hub_id"):
        raise OSError(f"timm {timm.__version__} knows no weights of the name {name!r}")
    return config


def _check_covers(wanted: Mapping[str, Any], found: Mapping[str, Any], path: str) -> None:
    wrong = [k for k in wanted if k not in found and not k.endswith("num_batches_tracked")]
    wrong += [
        f"{k} ({tuple(x.shape)} in the file, {tuple(wanted[k].shape)} in the model)"
        for k, x in found.items()
        if x.shape != wanted[k].shape
    ]
    if wrong:
        raise ValueError(
            f"{path!r} is not of the model that MODEL.TIMM.NAME (of a teacher, "
            "DISTILL.TEACHER.BACKBONE) says. Missing or of another shape: "
            f"{shown(wrong, 20)}."
        )


def _check_images(images: Images, pretrained: Mapping[str, Any], path: str) -> None:
    """Otherwise nothing would fail, and the weights would be worth little."""
    wanted = Images(
        "RGB", *(tuple(round(255 * x, 3) for x in pretrained[key]) for key in ("mean", "std"))
    )
    if not (
        images.order == wanted.order
        and _close(images.mean, wanted.mean)
        and _close(images.std, wanted.std)
    ):
        raise ValueError(
            f"{path!r} was trained on other images. Set {_as_keys(wanted)}; now it is "
            f"{_as_keys(images)}."
        )


def _close(found: Sequence[float], wanted: Sequence[float]) -> bool:
    """Within one of 255 grey levels: roundings of ImageNet's mean differ by less."""
    return len(found) == len(wanted) and all(abs(x - y) < 1 for x, y in zip(found, wanted))


def _as_keys(images: Images) -> str:
    mean, std = list(images.mean), list(images.std)
    return f'INPUT.FORMAT "{images.order}" MODEL.PIXEL_MEAN "{mean}" MODEL.PIXEL_STD "{std}"'
