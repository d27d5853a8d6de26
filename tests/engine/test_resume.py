"""What a resumed run says of values that are not the checkpoint's, and what it does with them."""

import copy
import logging
import re
import shutil
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
import torch

from detectron2.config import CfgNode
from detectron2.utils import comm

from d2kd.config import leaves, load_config
from d2kd.engine import Trainer
from d2kd.engine.resume import RunRecord, fingerprint
from d2kd.engine.resume_point import ResumePoint
from d2kd.engine.resume_rules import PASSED_OVER, REFUSED, RULES, TAKEN, UNUSED, rule_of
from d2kd.utils.plugin import import_file
from tests.helpers.runs import assert_same_tensors, at, build_trainer, run, run_config

DONE = 4  # iterations behind the checkpoint


@pytest.fixture(scope="module")
def begun(folder: Path, teacher: List[Any]) -> CfgNode:
    """Config of a run of 4 of 10 iterations: warm-up until 2, a step at 3, clipped gradients."""
    cfg = run_config(folder, teacher, ["PKD"], SOLVER__MAX_ITER=DONE)
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    run(cfg)
    return cfg


def resumed(cfg: CfgNode, *opts: Any) -> Trainer:
    cfg = cfg.clone()
    cfg.merge_from_list(list(opts))
    return build_trainer(cfg, resume=True)


def edited(cfg: CfgNode, folder: Path, edit: Callable[[Dict[str, Any]], Any]) -> CfgNode:
    """The run in another folder, with another state of its trainer."""
    shutil.copytree(cfg.OUTPUT_DIR, folder / "edited")
    path = folder / "edited" / "model_final.pth"
    checkpoint = torch.load(path, weights_only=True)
    edit(checkpoint["trainer"])
    torch.save(checkpoint, path)
    return at(cfg, folder, "edited")


def warnings(caplog: pytest.LogCaptureFixture) -> str:
    found = [x for x in caplog.records if x.name.startswith("d2kd.engine.resume")]
    return "\n".join(x.getMessage() for x in found if x.levelno >= logging.WARNING)


# Which keys --------------------------------------------------------------------------------------

EXAMPLES = {
    REFUSED: ["SEED", "SOLVER.IMS_PER_BATCH", "SOLVER.REFERENCE_WORLD_SIZE", "DATASETS.TRAIN"]
    + ["DATASETS.SHAPES.TEXTURE", "DATALOADER.SAMPLER_TRAIN", "DATALOADER.FILTER_EMPTY_ANNOTATIONS"]
    + ["MODEL.RETINANET.NUM_CONVS", "MODEL.PIXEL_STD", "INPUT.FORMAT", "MODEL.META_ARCHITECTURE"]
    + ["DISTILL.LEVELS", "DISTILL.STAGES", "DISTILL.TEACHER.ALIASES", "DISTILL.MGD.MASK_RATIO"]
    + ["DISTILL.ReviewKD.MID_CHANNELS", "DISTILL.UNLABELLED.SHARE", "DISTILL.TEACHER.CLASSES"]
    + ["DISTILL.TEACHERS", "DISTILL.ADAPT_EQUAL_CHANNELS"],
    TAKEN: ["SOLVER.BASE_LR", "SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE"]
    + ["SOLVER.AMP.ENABLED", "DISTILL.MGD.LOSS_WEIGHT", "DISTILL.FGD.FOREGROUND_WEIGHT"]
    + ["DISTILL.MGD.SCHEDULE.STOP_ITER", "DISTILL.REGIONS.PER_IMAGE", "INPUT.MIN_SIZE_TRAIN"]
    + ["TEST.EVAL_PERIOD", "VIS_PERIOD", "MODEL.RETINANET.SCORE_THRESH_TEST", "DATASETS.TEST"]
    + ["DATASETS.SHAPES.NUM_TEST", "DISTILL.TEACHER.FOLD_NORMS", "DISTILL.TEACHER.DEVICE"]
    + ["DATASETS.SHAPES.NUM_VAL", "DATASETS.PROPOSAL_FILES_TRAIN", "DATASETS.PROPOSAL_FILES_TEST"]
    + ["DISTILL.LIVENESS.ENABLED", "DISTILL.LIVENESS.PERIOD", "DISTILL.STAGE_LR", "MODEL.DEVICE"],
    UNUSED: ["MODEL.WEIGHTS", "DISTILL.INHERIT", "DISTILL.TEACHER.EVAL_IMAGES"]
    + ["DISTILL.TEACHER.MIN_AP", "DISTILL.TEACHER.ALLOW_OTHER_CLASSES"],
    # The teacher itself is compared by its manifest, the optimizer by its state.
    PASSED_OVER: ["OUTPUT_DIR", "DATALOADER.NUM_WORKERS", "DISTILL.TEACHER.WEIGHTS", "VERSION"]
    + ["SOLVER.OPTIMIZER", "DATASETS.COCO_FORMAT", "DATASETS.SHAPES.ROOT", "DISTILL.HEADS"]
    + ["DISTILL.UNLABELLED.SETS", "DISTILL.TEACHER.CONFIG_FILE", "DISTILL.TEACHER.OPTS"]
    + ["DISTILL.TEACHER.BACKBONE", "DISTILL.TEACHER.BACKBONE_STRIDES", "DISTILL.ENABLED"]
    + ["DISTILL.STUDENT_META_ARCHITECTURE"],
}


@pytest.mark.parametrize("action", EXAMPLES)
def test_keys_have_the_action_that_their_rule_says(action: str) -> None:
    known = list(dict(leaves(load_config())))
    for key in EXAMPLES[action]:
        assert key in known and rule_of(key).action == action, key


def test_every_rule_is_the_first_for_some_key_and_only_detections_of_a_model_may_change() -> None:
    rules = {key: rule_of(key) for key, _ in leaves(load_config())}
    assert set(rules.values()) == set(RULES)
    taken = [k for k, x in rules.items() if k.startswith("MODEL.") and x.action == TAKEN]
    assert "MODEL.DEVICE" in taken and all(k.endswith(("_TEST", "DEVICE")) for k in taken)


# Which checkpoint ---------------------------------------------------------------------------------


def test_processes_that_find_different_checkpoints_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on two machines, each with a disk of its own."""
    told: Dict[str, str] = {}
    for name, iteration, seed in (("a", 3, 7), ("b", 3, 7), ("c", 5, 7), ("d", 3, 8)):
        (tmp_path / name).mkdir()
        last = f"model_{iteration:07}.pth"
        state = {"trainer": {"iteration": iteration, "seed": seed}}
        torch.save(state, tmp_path / name / last)
        (tmp_path / name / "last_checkpoint").write_text(last)

    def find(of_main: str, of_other: str) -> ResumePoint:
        """In the second of two processes."""
        for name in (of_main, of_other):
            monkeypatch.setattr(comm, "all_gather", lambda x: [told.setdefault(name, x)])
            ResumePoint.find_together(str(tmp_path / name))
        monkeypatch.setattr(comm, "all_gather", lambda x: [told[of_main], x])
        return ResumePoint.find_together(str(tmp_path / of_other))

    assert find("a", "b").done == 4
    for pair, words in (
        (("a", "c"), "process 0 model_0000003.pth of seed 7, process 1 model_0000005.pth of seed"),
        (("a", "d"), "process 1 model_0000003.pth of seed 8"),
        (("none", "a"), "process 0 no checkpoint, process 1 model_0000003.pth"),
    ):
        with pytest.raises(ValueError, match=f"OUTPUT_DIR: the processes find .*{words}"):
            find(*pair)


# Refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("SEED", 8, "SEED: 1, now 8: the images"),
        ("SOLVER.IMS_PER_BATCH", 4, "SOLVER.IMS_PER_BATCH: 2, now 4"),
        ("DATALOADER.ASPECT_RATIO_GROUPING", False, "GROUPING: True, now False"),
        ("DATASETS.SHAPES.NOISE", 7.0, "DATASETS.SHAPES.NOISE: 6.0, now 7.0"),
        ("MODEL.RETINANET.NUM_CONVS", 2, "MODEL.RETINANET.NUM_CONVS: 1, now 2: the checkpoint's"),
        ("MODEL.PIXEL_STD", [2.0, 2.0, 2.0], r"PIXEL_STD: \[.*\], now \[2.0, 2.0, 2.0\]"),
        ("DISTILL.LEVELS", [["p4", "p4"]], r"DISTILL.LEVELS: \[\], now \[\['p4', 'p4'\]\]"),
        ("DISTILL.PKD.NUM_LEVELS", 3, "DISTILL.PKD.NUM_LEVELS: 4, now 3: the head has learnt"),
    ],
)
def test_value_that_would_make_another_run_is_refused_with_both_values_and_a_way_out(
    begun: CfgNode, key: str, value: Any, message: str
) -> None:
    saved = RunRecord(begun, begun.SEED, [IMAGE]).state_dict()
    cfg = begun.clone()
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError, match=f"(?s){message}.*OUTPUT_DIR of its own"):
        RunRecord(cfg, cfg.SEED, [IMAGE]).compare(saved)


def test_all_refused_keys_are_named_at_once_before_pytorch_finds_what_does_not_fit(
    begun: CfgNode,
) -> None:
    with pytest.raises(ValueError, match="(?s)MODEL.RETINANET.NUM_CONVS.*\n  SEED.*WEIGHTS"):
        resumed(begun, "SEED", 8, "MODEL.RETINANET.NUM_CONVS", 2)


def test_end_that_has_been_passed_is_refused(begun: CfgNode) -> None:
    with pytest.raises(ValueError, match="SOLVER.MAX_ITER is 3, .* has 4 iterations"):
        resumed(begun, "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", ())


# Taken -------------------------------------------------------------------------------------------

SOLVERS = [
    ["BASE_LR", 0.001, "MOMENTUM", 0.8, "NESTEROV", True, "WEIGHT_DECAY", 0.01],
    ["WEIGHT_DECAY_NORM", 0.01, "BIAS_LR_FACTOR", 2.0],  # other groups than the checkpoint has
    ["STEPS", (8,), "GAMMA", 0.5, "WARMUP_ITERS", 6],
    ["LR_SCHEDULER_NAME", "WarmupCosineLR"],
    ["CLIP_GRADIENTS.CLIP_TYPE", "full_model"],
]


@pytest.mark.parametrize("values", SOLVERS, ids=[x[0] for x in SOLVERS])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_new_value_of_the_solver_counts_as_if_it_had_been_there_from_the_start(
    values: List[Any], begun: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    opts = [f"SOLVER.{x}" if i % 2 == 0 else x for i, x in enumerate(values)]
    opts += ["SOLVER.MAX_ITER", 10]
    trainer = resumed(begun, *opts)
    cfg = begun.clone()
    cfg.merge_from_list(opts)
    new = build_trainer(cfg)
    for _ in range(DONE):
        new.scheduler.step()
    assert groups(trainer) == groups(new)
    assert trainer.scheduler.state_dict() == new.scheduler.state_dict()
    # What the optimizer remembers goes to the parameter of that name.
    saved = torch.load(Path(cfg.OUTPUT_DIR) / "model_final.pth", weights_only=True)["trainer"]
    state = saved["_trainer"]["optimizer"]["state"]
    expected = {name: state[i] for i, name in enumerate(saved["parameters"]) if i in state}
    actual = momentum(trainer)
    assert len(actual) == len(expected) > 20
    for name, x in expected.items():
        assert torch.equal(actual[name], x["momentum_buffer"]), name
    assert all(f"{key} " in warnings(caplog) for key in opts[0::2])


def groups(trainer: Trainer) -> List[Dict[str, Any]]:
    return trainer.optimizer.state_dict()["param_groups"]


def momentum(trainer: Trainer) -> Dict[str, torch.Tensor]:
    """By the names in a checkpoint: the student's, and the heads'."""
    named, state = dict(trainer._module.named_parameters()), trainer.optimizer.state
    return {
        k.replace("student.", "", 1): state[p]["momentum_buffer"]
        for k, p in named.items()
        if p in state
    }


def test_what_is_taken_and_what_has_no_effect_is_said_in_one_table_and_nothing_else_is(
    begun: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    resumed(begun)
    assert not warnings(caplog)
    opts = ["SOLVER.BASE_LR", 0.5, "DISTILL.PKD.LOSS_WEIGHT", 3.0, "MODEL.WEIGHTS", "some.pth"]
    opts += ["DATALOADER.NUM_WORKERS", 1, "DISTILL.MGD.MASK_RATIO", 0.5]
    resumed(begun, *opts, "MODEL.FCOS.NUM_CONVS", 1)
    said = warnings(caplog)
    for row in (
        "SOLVER.BASE_LR +0.002 +0.5 +taken",
        "DISTILL.PKD.LOSS_WEIGHT +6.0 +3.0 +taken",
        "MODEL.WEIGHTS +some.pth +no effect: the checkpoint",
    ):
        assert re.search(row, said), said
    assert "NUM_WORKERS" not in said  # the batches are the same
    assert "MGD" not in said and "FCOS" not in said  # not in this run


def test_mixed_precision_may_be_switched_on(
    begun: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = resumed(begun, "SOLVER.AMP.ENABLED", True)
    assert trainer.start_iter == DONE and "grad_scaler" in trainer._trainer.state_dict()
    assert "SOLVER.AMP.ENABLED" in warnings(caplog)


# What is not a key -------------------------------------------------------------------------------


def test_checkpoint_without_a_config_is_resumed_and_that_is_said(
    begun: CfgNode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def forget(state: Dict[str, Any]) -> None:
        for key in ("config", "data", "environment", "parameters"):
            del state[key]

    old = edited(begun, tmp_path, forget)
    trainer, expected = resumed(old, "SOLVER.MAX_ITER", 10), resumed(begun, "SOLVER.MAX_ITER", 10)
    assert trainer.start_iter == DONE
    assert groups(trainer) == groups(expected)
    assert_same_tensors(momentum(trainer), momentum(expected))
    assert "no config in it" in warnings(caplog)
    with pytest.raises(ValueError, match="SEED: 1, now 8"):
        resumed(old, "SEED", 8)


def test_optimizer_of_other_parameters_is_refused_by_the_name_of_one(
    begun: CfgNode, tmp_path: Path
) -> None:
    other = edited(begun, tmp_path, lambda x: x.update(parameters=["a", *x["parameters"][1:]]))
    with pytest.raises(ValueError, match="optimizer trained other parameters: a is not in both"):
        resumed(other)


def test_groups_without_names_are_compared_by_their_sizes(begun: CfgNode, tmp_path: Path) -> None:
    def move_one(state: Dict[str, Any]) -> None:
        del state["parameters"]
        first, last = (state["_trainer"]["optimizer"]["param_groups"][i] for i in (0, -1))
        last["params"].append(first["params"].pop())

    with pytest.raises(ValueError, match="optimizer trained other parameters"):
        resumed(edited(begun, tmp_path, move_one))


def test_images_that_changed_behind_the_same_name_are_refused(
    begun: CfgNode, tmp_path: Path
) -> None:
    other = edited(begun, tmp_path, lambda x: x["data"].update(images=9, sha256="0"))
    with pytest.raises(ValueError, match=r"DATASETS.TRAIN: .*\(9 images then, 8 now"):
        resumed(other)


IMAGE = {"file_name": "/a/1.png", "height": 4, "width": 5, "image_id": 1}
IMAGE["annotations"] = [{"category_id": 0, "bbox": [0, 1, 2, 3], "segmentation": []}]


def test_fingerprint_tells_what_is_in_the_images_and_not_where_they_are() -> None:
    one = fingerprint([IMAGE])
    assert one["images"] == 1
    assert fingerprint([{**IMAGE, "file_name": "/b/1.png"}]) == one
    changed = [
        {**IMAGE, "file_name": "/a/2.png"},
        {**IMAGE, "width": 6},
        {**IMAGE, "annotations": []},
    ]
    for key, value in (("category_id", 1), ("bbox", [0, 1, 2, 4])):
        changed.append({**IMAGE, "annotations": [{**IMAGE["annotations"][0], key: value}]})
    found = [one, *(fingerprint([x]) for x in changed)]
    pairs = [fingerprint([IMAGE, changed[0]]), fingerprint([changed[0], IMAGE])]
    assert len({x["sha256"] for x in found + pairs}) == 8


def test_other_version_or_number_of_processes_is_said(
    begun: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    record = RunRecord(begun, 7, [IMAGE])
    state = copy.deepcopy(record.state_dict())
    record.compare(state)
    assert not warnings(caplog)
    state["environment"].update({"PyTorch": "1.0", "number of processes": 8})
    record.compare(state)
    said = warnings(caplog)
    assert "PyTorch 1.0 (now" in said and "number of processes 8 (now 1)" in said
    assert "d2kd" not in said.split("(")[0]


def test_edited_plugin_is_said(
    begun: CfgNode, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text("FACTOR = 1")
    import_file(str(plugin))
    record = RunRecord(begun, 7, [IMAGE])
    state = copy.deepcopy(record.state_dict())
    record.compare(state)
    assert not warnings(caplog)
    state["environment"]["--plugin mine.py"] = "0123456789ab"
    record.compare(state)
    assert "--plugin mine.py 0123456789ab (now" in warnings(caplog)
