"""Every key d2kd adds to Detectron2's config, and reading a YAML without letting a typo through."""

import os
from typing import Any, Dict, Iterator, List, Sequence, Tuple

import torch

from detectron2.config import CfgNode, get_cfg

from .checks import nearest
from .data.config import add_data_config
from .heads import DISTILL_HEAD_REGISTRY
from .modeling import add_model_config
from .schedule import add_schedule_config
from .views.region_sampler import add_region_config
from .yaml_file import read_yaml


def add_distill_config(cfg: CfgNode) -> None:
    """
    Add d2kd's keys to a config from detectron2.config.get_cfg().

    The keys of a head, DISTILL.<NAME>.*, are written by the head itself (`add_config`, in
    d2kd/heads), so that a head registered by a user has them too: import it before this call.
    """
    add_data_config(cfg)
    add_model_config(cfg)
    # Metric of Detectron2's evaluator by which model_best.pth is chosen; "": none is kept
    cfg.TEST.BEST_METRIC = "bbox/AP"

    node = cfg.DISTILL = CfgNode()
    # False trains the student alone: exactly the run without d2kd. Said in the log.
    node.ENABLED = True
    # The student's own meta-architecture; MODEL.META_ARCHITECTURE is "Distiller"
    node.STUDENT_META_ARCHITECTURE = ""
    # Methods to apply together, such as ["MGD"]; their keys are DISTILL.<NAME>.*
    node.HEADS = []
    # [[student level, teacher level], ...]; []: pair the levels of equal stride
    node.LEVELS = []
    # Parts of the student initialised from the teacher before training, after MODEL.WEIGHTS:
    # "neck" (the pyramid without its backbone), "head" (everything else that predicts)
    node.INHERIT = []
    # Several teachers in turn, the student carried over, heads and optimizer anew; [] is one stage.
    # Each is a mapping of ITERATIONS, which must add up to SOLVER.MAX_ITER, and where it differs
    # from the run, TEACHER (with a CONFIG_FILE of its own, nothing of the run's), HEADS, INHERIT
    # (from the second stage on nothing by default), and OPTS, as on the command line: a head's
    # keys, DISTILL.LEVELS, DISTILL.REGIONS and the learning rate's of SOLVER. DISTILL.ENABLED False
    # ignores stages.
    node.STAGES = []
    # "restart": each stage has SOLVER's schedule, warm-up included, with STEPS at the same shares
    # of the stage as of the run. "continue": one schedule over the whole run
    node.STAGE_LR = "restart"

    node.TEACHER = CfgNode()
    # YAML or LazyConfig .py: a path, or a name in Detectron2's model zoo, such as
    # "COCO-Detection/retinanet_R_101_FPN_3x.yaml"
    node.TEACHER.CONFIG_FILE = ""
    # Trained detector: a path or URL; "": the checkpoint that belongs to a model-zoo name
    node.TEACHER.WEIGHTS = ""
    # Overrides of the teacher's config, as on the command line: ["MODEL.RETINANET.NUM_CLASSES", 4]
    node.TEACHER.OPTS = []
    # Names of its classes, in order; []: those of the first data set in its config. Of classes that
    # are not the student's, heads that compare logits compare the common ones
    node.TEACHER.CLASSES = []
    # [[student's class, teacher's class], ...] that are the same, of other names; several of one
    # side are joined. A class that is named here is what the pairs say and nothing else, whatever
    # its name; "" on one side: the other has no equal
    node.TEACHER.ALIASES = []
    # Go on where no class is in both, with heads that compare features
    node.TEACHER.ALLOW_OTHER_CLASSES = False
    # Images of the first test set on which the teacher is evaluated before training; 0: it is not
    node.TEACHER.EVAL_IMAGES = 100
    # COCO's box AP in percent below which the run is refused then
    node.TEACHER.MIN_AP = 1.0
    # Only for tests and benchmarks: go on with a teacher that knows nothing
    node.TEACHER.ALLOW_RANDOM_WEIGHTS = False

    node.REGIONS = CfgNode()
    add_region_config(node.REGIONS)

    # What each loss does to the student's pyramid, as a table in the log and in TensorBoard. False:
    # neither, and nothing stops a run in which a term does nothing
    node.LIVENESS = CfgNode()
    node.LIVENESS.ENABLED = True
    # Steps in which each head is watched, from the first in which its weight is not 0. A term that
    # is constant, or has no gradient, in all of them stops the run
    node.LIVENESS.FIRST_STEPS = 3
    # Iterations between two looks after that; 0: none. A look costs, for each term, a backward from
    # it to the pyramid; the log says how long it took
    node.LIVENESS.PERIOD = 1000
    # Share of the gradient, in (0, 1), for which loss weights are suggested; nothing is changed
    node.LIVENESS.WANTED_SHARE = 0.5

    for name, head in DISTILL_HEAD_REGISTRY:
        head_node = node[name[: -len("Head")]] = CfgNode()
        head.add_config(head_node)
        add_schedule_config(head_node)


def load_config(config_file: str = "", opts: Sequence[Any] = ()) -> CfgNode:
    """
    Detectron2's and d2kd's defaults, then a YAML file, then overrides.

    Args:
        config_file: path of a YAML; "": none
        opts: key, value, key, value, ... as on the command line

    Raises:
        FileNotFoundError: no such YAML
        ValueError: a YAML that is empty or wants to run code, or a key that nobody reads, with the
            nearest one that somebody does
    """
    cfg = get_cfg()
    add_distill_config(cfg)
    # Detectron2's default is "cuda" on every machine. A GPU is used without being asked for.
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    if config_file:
        if not os.path.isfile(config_file):
            raise FileNotFoundError(f"Config file {config_file!r} does not exist.")
        try:
            merge_mapping(cfg, read_yaml(config_file), config_file)
        except RecursionError:
            raise ValueError(f"{config_file} is nested too deeply, or in itself.") from None
    merge_opts(cfg, opts, "the command line")
    return cfg


def merge_mapping(cfg: CfgNode, mapping: Dict[str, Any], source: str) -> None:
    """
    Merge keys and values that are nested as in a YAML into cfg.

    Raises:
        ValueError: an unknown key, or a value of the wrong type
    """
    _refuse_unknown(cfg, list(_unknown(cfg, mapping, source)), source)
    before = dict(leaves(cfg))
    try:
        cfg.merge_from_other_cfg(CfgNode(mapping))
    except (AssertionError, ValueError) as error:  # yacs, of another type, a date, a set or bytes
        raise ValueError(f"{source}: {error}") from None
    _refuse_none(cfg, before, source)


def merge_opts(cfg: CfgNode, opts: Sequence[Any], source: str) -> None:
    """
    Merge key, value, key, value, ... into cfg.

    Raises:
        ValueError: an odd number of words, an unknown key, or a value of the wrong type
    """
    if len(opts) % 2:
        raise ValueError(f"{source}: overrides come as KEY VALUE pairs, got {list(opts)}.")
    known = {**dict.fromkeys(_inner(cfg)), **dict(leaves(cfg))}
    _refuse_unknown(cfg, [str(key) for key in opts[0::2] if str(key) not in known], source)
    before = dict(leaves(cfg))
    for key, value in zip(opts[0::2], opts[1::2]):
        if key not in before:
            raise ValueError(f"{source}: {key} is a group of keys; name one of them, {key}.<KEY>.")
        try:
            cfg.merge_from_list([key, value])
        # What yacs and its parser of literals have been seen to raise.
        except (AssertionError, MemoryError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"{source}: {key} cannot be {str(value)[:80]!r}: {error}") from None
    _refuse_none(cfg, before, source)


def _unknown(
    node: CfgNode, mapping: Dict[str, Any], source: str, prefix: str = ""
) -> Iterator[str]:
    """Dotted names of what is in `mapping` and not in `node`."""
    for key, value in mapping.items():
        name = f"{prefix}{key}"
        if key not in node:
            yield name
        elif isinstance(node[key], CfgNode) and not isinstance(value, dict):
            keys = ", ".join(list(node[key])[:3])
            raise ValueError(f"{source}: {name} must be a mapping of {keys}, ..., got {value!r}.")
        elif isinstance(value, dict) and not isinstance(node[key], CfgNode):
            raise ValueError(f"{source}: {name} must be a value such as {node[key]!r}, no mapping.")
        elif isinstance(value, dict):
            yield from _unknown(node[key], value, source, f"{name}.")


def _refuse_unknown(cfg: CfgNode, keys: List[str], source: str) -> None:
    """
    Raises:
        ValueError: naming each of `keys`, which cfg does not have, with the nearest one it has
    """
    known = set(flatten(cfg)) | set(_inner(cfg))
    lines = []
    for key in keys:
        near = nearest(key, known)
        hint = f" (did you mean {near[0]}?)" if near else ""
        hint = " (a YAML nests it: a mapping at each dot)" if key in known else hint
        lines.append(f"  {key}{hint}")
    if lines:
        raise ValueError(f"{source} has keys that nobody reads:\n" + "\n".join(lines))


def student_config(cfg: CfgNode) -> CfgNode:
    """The stock Detectron2 part of a distillation config: builds and runs the student alone."""
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.META_ARCHITECTURE == "Distiller":
        cfg.MODEL.META_ARCHITECTURE = cfg.DISTILL.STUDENT_META_ARCHITECTURE
        cfg.DISTILL.HEADS = []
    return cfg


def _refuse_none(cfg: CfgNode, before: Dict[str, Any], source: str) -> None:
    """yacs lets None take the place of a number, of which somebody else would then complain."""
    for key, value in leaves(cfg):
        if value is None and before.get(key) is not None:
            raise ValueError(f"{source}: {key} is None. Give it a value, or leave the key out.")


def flatten(node: Dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all leaves."""
    return (key for key, _ in leaves(node, prefix))


def leaves(node: Dict[str, Any], prefix: str = "") -> Iterator[Tuple[str, Any]]:
    """Dotted names and values."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _inner(node: Dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted names of all nodes that hold others."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield f"{prefix}{key}"
            yield from _inner(value, f"{prefix}{key}.")
