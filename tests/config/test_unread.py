"""Keys that are known and not read: which they are, and what is said of them."""

from pathlib import Path
from typing import Any, Dict, Iterator, List, Set

import pytest
from yacs.config import CfgNode as YacsNode

from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer

from d2kd import doctor
from d2kd.config import leaves
from d2kd.config.unread import refuse_unread, unread_keys, why_unread
from d2kd.engine.stages import plan_stages
from d2kd.teacher import build_teacher
from tests.helpers.runs import build_trainer, run_config
from tests.helpers.toys import detector_config, distill_config, write_teacher

# Why a key of Detectron2 may be read by nobody here
HARMLESS = {
    "VERSION": "read when a YAML is",
    "GLOBAL.HACK": "for code of a user's",
    "MODEL.WEIGHTS": "read when there is no checkpoint",
    "CUDNN_BENCHMARK": "read by train_net.py's default_setup",
    "FLOAT32_PRECISION": "read by train_net.py's default_setup",
    "TEST.AUG.ENABLED": "refused",
    "TEST.EXPECTED_RESULTS": "read when the training ends",
    "MODEL.ANCHOR_GENERATOR.ANGLES": "of rotated anchors, which no view serves",
}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[Set[str]]:
    """Keys that are looked up in configs that :func:`name_nodes` was given, or in copies."""
    keys: Set[str] = set()
    look_up = YacsNode.__getattr__

    def look_up_and_remember(node: CfgNode, name: str) -> Any:
        if not name.startswith("_"):
            keys.add(node.__dict__.get("prefix", "") + name)
        return look_up(node, name)

    monkeypatch.setattr(YacsNode, "__getattr__", look_up_and_remember)
    yield keys


def name_nodes(node: CfgNode, prefix: str = "") -> None:
    node.__dict__["prefix"] = prefix
    for key, value in node.items():
        if isinstance(value, CfgNode):
            name_nodes(value, f"{prefix}{key}.")


def test_every_key_of_detectron2_is_read_or_known_not_to_be(
    tmp_path: Path, teacher: List[Any], read: Set[str]
) -> None:
    """A key that a new Detectron2 adds and that is not on the way of a run is noticed here."""
    configs = [
        run_config(tmp_path, teacher, ["PKD"]),
        run_config(tmp_path, student="faster_rcnn", DATALOADER__NUM_WORKERS=0),
        run_config(
            tmp_path,
            student="cascade_rcnn",
            SOLVER__CLIP_GRADIENTS__ENABLED=True,
            SOLVER__CLIP_GRADIENTS__CLIP_TYPE="full_model",
        ),
    ]
    for cfg in configs:
        cfg.DATASETS.TEST = ("d2kd_shapes_val",)
        name_nodes(cfg)
        build_trainer(cfg)
        next(iter(DefaultTrainer.build_test_loader(cfg, cfg.DATASETS.TEST[0])))
    said = {key for key, _ in leaves(cfg) if all(why_unread(key, x) for x in configs)}
    left = set(dict(leaves(get_cfg()))) - read - said - set(HARMLESS)
    assert not left


@pytest.fixture
def run_yaml(tmp_path: Path) -> Dict[str, Any]:
    opts = write_teacher(tmp_path, "retinanet", MODEL__RETINANET__NORM="")
    cfg = distill_config("retinanet", opts, ["PKD"], MODEL__RETINANET__NORM="")
    (tmp_path / "run.yaml").write_text(cfg.dump())
    return {"cfg": cfg, "path": str(tmp_path / "run.yaml")}


# On the command line, of a distilled RetinaNet
UNREAD = [
    ("DISTILL.MGD.LOSS_WEIGHT", 1.0, r"where 'MGD' is in DISTILL.HEADS, which is \['PKD'\]"),
    ("DISTILL.REGIONS.PER_IMAGE", 8, "by heads that use regions"),
    ("DISTILL.UNLABELLED.SHARE", 0.3, "with DISTILL.UNLABELLED.SETS"),
    ("DISTILL.PKD.SCHEDULE.DECAY_FROM", 8, "with DISTILL.PKD.SCHEDULE.DECAY linear or cosine"),
    ("DISTILL.STAGE_LR", "continue", "with DISTILL.STAGES"),
    ("MODEL.FCOS.SCORE_THRESH_TEST", 0.3, "by FCOS"),
    ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.3, "by two-stage detectors"),
    ("MODEL.SWIN.DEPTHS", [1, 1, 1, 1], "with a Swin in MODEL.BACKBONE.NAME"),
    ("MODEL.MASK_ON", True, "by two-stage detectors"),
    ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 35.0, "with SOLVER.CLIP_GRADIENTS.ENABLED"),
    ("SOLVER.MOMENTUM", 0.8, "with SOLVER.OPTIMIZER SGD"),
    ("SOLVER.NESTEROV", True, "with SOLVER.OPTIMIZER SGD"),
    ("INPUT.CROP.SIZE", [0.5, 0.5], "with INPUT.CROP.ENABLED"),
    ("DATALOADER.REPEAT_THRESHOLD", 0.1, "SAMPLER_TRAIN RepeatFactorTrainingSampler"),
    ("DATASETS.SHAPES.NOISE", 1.0, "with a built-in set in DATASETS"),
    ("TEST.EVAL_PERIOD", 5, "with a set in DATASETS.TEST"),
    ("TEST.AUG.FLIP", False, "by features that d2kd does not support"),
]


@pytest.mark.parametrize("key, value, who", UNREAD, ids=[x[0] for x in UNREAD])
def test_override_that_nobody_reads_is_refused_with_what_would_read_it(
    key: str, value: Any, who: str
) -> None:
    cfg = distill_config("retinanet", [], ["PKD"], SOLVER__OPTIMIZER="ADAMW")
    opts = ["SOLVER.BASE_LR", 0.1, key, value]
    cfg.merge_from_list(opts)
    with pytest.raises(
        ValueError, match=f"The command line has keys .*\n  {key} .read only .*{who}"
    ):
        refuse_unread(cfg, opts, "The command line")
    assert key in unread_keys(cfg)


@pytest.mark.parametrize(
    "key, switch, off",
    [
        ("DISTILL.TEACHER.MIN_AP", "DISTILL.TEACHER.EVAL_IMAGES", 0),
        ("DISTILL.LIVENESS.PERIOD", "DISTILL.LIVENESS.ENABLED", False),
    ],
)
def test_key_of_a_check_is_unread_where_that_is_switched_off(
    key: str, switch: str, off: Any
) -> None:
    cfg = distill_config("retinanet", [], ["PKD"])
    cfg.merge_from_list(["DISTILL.TEACHER.EVAL_IMAGES", 10])
    assert not why_unread(key, cfg)
    cfg.merge_from_list([switch, off])
    assert why_unread(key, cfg).startswith(f"with {switch}") and not why_unread(switch, cfg)


def test_override_is_read_where_its_reader_is(teacher: List[Any]) -> None:
    opts = ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 35.0]
    opts += ["DISTILL.STAGES", [{"HEADS": ["MGD"]}], "DISTILL.MGD.LOSS_WEIGHT", 1.0]
    opts += ["DISTILL.PKD.SCHEDULE.DECAY", "linear", "DISTILL.PKD.SCHEDULE.DECAY_FROM", 1]
    cfg = distill_config("retinanet", [], ["PKD"])
    cfg.merge_from_list(opts)
    refuse_unread(cfg, opts, "The command line")


@pytest.mark.parametrize("head, who", [("PKD", "by heads that need boxes"), ("FGD", "")])
def test_score_of_boxes_is_read_where_a_head_needs_boxes(head: str, who: str) -> None:
    opts = ["DISTILL.UNLABELLED.SETS", ["more"], "DISTILL.UNLABELLED.BOX_SCORE", 0.5]
    cfg = distill_config("retinanet", [], [head])
    cfg.merge_from_list(opts)
    assert why_unread(opts[2], cfg).partition(";")[0] == who


def test_student_alone_takes_the_overrides_of_the_distilled_one() -> None:
    opts = ["DISTILL.MGD.LOSS_WEIGHT", 1.0]
    plain, disabled = detector_config("retinanet"), distill_config("retinanet", [], ["PKD"])
    disabled.DISTILL.ENABLED = False
    for cfg in (plain, disabled):
        refuse_unread(cfg, opts, "The command line")


def test_detector_of_a_user_may_read_every_key() -> None:
    cfg = detector_config("retinanet")
    cfg.MODEL.BACKBONE.NAME = cfg.MODEL.META_ARCHITECTURE = "SomebodyElses"
    refuse_unread(cfg, ["MODEL.FCOS.NUM_CONVS", 1, "MODEL.SWIN.DEPTHS", [1]], "The command line")


def test_doctor_refuses_the_command_line_and_not_the_yaml(
    run_yaml: Dict[str, Any], capsys: pytest.CaptureFixture
) -> None:
    words = ["DISTILL.MGD.LOSS_WEIGHT", "1.0"]
    assert doctor.main(["--config-file", run_yaml["path"], *words]) == 2
    assert "DISTILL.MGD.LOSS_WEIGHT (read only where 'MGD'" in capsys.readouterr().err
    run_yaml["cfg"].DISTILL.MGD.LOSS_WEIGHT = 1.0
    Path(run_yaml["path"]).write_text(run_yaml["cfg"].dump())
    doctor.main(["--config-file", run_yaml["path"]])
    assert "DISTILL.MGD" not in capsys.readouterr().err


def test_override_of_a_stage_is_refused_where_its_head_is_not() -> None:
    cfg = distill_config("retinanet", [], ["PKD"], SOLVER__MAX_ITER=2, SOLVER__WARMUP_ITERS=1)
    cfg.SOLVER.STEPS = ()
    cfg.DISTILL.STAGES = [
        {"ITERATIONS": 1, "HEADS": ["MGD"]},
        {"ITERATIONS": 1, "OPTS": ["DISTILL.MGD.MASK_RATIO", 0.5]},
    ]
    message = r"(?s)DISTILL.STAGES\[1\]: OPTS has keys .*DISTILL.MGD.MASK_RATIO .read only where"
    with pytest.raises(ValueError, match=message):
        plan_stages(cfg)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("SOLVER.BASE_LR", 0.1, "SOLVER.BASE_LR, which would have no effect.*neither trains"),
        ("INPUT.MIN_SIZE_TEST", 300, "INPUT.MIN_SIZE_TEST, which would have no effect"),
        ("MODEL.WEIGHTS", "x.pth", "MODEL.WEIGHTS, .*: DISTILL.TEACHER.WEIGHTS names its weights"),
        ("MODEL.DEVICE", "cuda", "MODEL.DEVICE, .*: it runs on the student's device"),
        ("MODEL.FCOS.NUM_CONVS", 2, "OPTS has keys .*\n  MODEL.FCOS.NUM_CONVS .read only by FCOS"),
    ],
)
def test_override_of_a_teacher_that_changes_nothing_is_refused(
    key: str, value: Any, message: str, teacher: List[Any]
) -> None:
    cfg = distill_config("retinanet", teacher, ["PKD"])
    cfg.DISTILL.TEACHER.OPTS = [key, value]
    with pytest.raises(ValueError, match="DISTILL.TEACHER.OPTS has") as error:
        build_teacher(cfg)
    error.match(message)


def test_training_keys_of_a_lazy_teacher_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "teacher.py"
    file.write_text("model = dict(_target_='torch.nn.Linear', in_features=1, out_features=1)\n")
    cfg = distill_config("retinanet", [], ["PKD"])
    cfg.DISTILL.TEACHER.CONFIG_FILE = str(file)
    cfg.DISTILL.TEACHER.ALLOW_RANDOM_WEIGHTS = True
    cfg.DISTILL.TEACHER.OPTS = ["train.init_checkpoint=x.pth"]
    with pytest.raises(ValueError, match="train.init_checkpoint would have no effect.*WEIGHTS"):
        build_teacher(cfg)
