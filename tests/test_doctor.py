"""One command tells whether a distillation can be run, what it does and what it costs."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, List

import pytest
import torch
from PIL import Image
from torch import nn

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from d2kd import doctor, load_config
from d2kd.data.shapes import SPLITS
from d2kd.engine.preflight import teacher_savings
from d2kd.heads.registry import head_names
from d2kd.teacher import Teacher
from tests.helpers.toy_sets import name_sets, second, write_set
from tests.helpers.toys import distill_config, write_teacher


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[..., str]:
    """Writes the YAML of a toy distillation."""

    def write(student: str, teacher: str, heads: List[str], **overrides: Any) -> str:
        cfg = distill_config(student, write_teacher(tmp_path, teacher), heads, **overrides)
        path = tmp_path / "run.yaml"
        path.write_text(cfg.dump())
        return str(path)

    return write


@pytest.fixture
def forget(forget_sets: None) -> None:
    """As forget_sets, also of the built-in ones, which other tests may have registered."""
    for name in set(SPLITS) & set(DatasetCatalog.list()):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_run_that_works_is_described(
    config_file: Callable, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    path = config_file("retinanet", "faster_rcnn", ["PKD", "MGD"])
    before = sorted(x.name for x in tmp_path.iterdir())
    assert doctor.main(["--config-file", path, "SOLVER.MAX_ITER", "3600"]) == 0
    text = capsys.readouterr().out
    for words in ("head PKD", "p3 (stride 8, 32 channels) <- p3", "loss_mgd", "3600 iterations"):
        assert words in text
    assert text.endswith("\nIt can be run.\n")
    assert re.search(r"DISTILL\.PKD\.LOSS_WEIGHT [\d.e+-]+ \(now 6\)", text)
    assert re.search(r"[\d.]+ s a step of 2 images of 64x85 on cpu", text)
    assert re.search(r"The teacher takes [\d.]+ s of it, \d+%", text)
    assert re.search(r"\nFOLD_NORMS and CHANNELS_LAST +[\d.]+ s +[+-]\d+% of the step saved", text)
    assert sorted(x.name for x in tmp_path.iterdir()) == before, "nothing is written"


@pytest.mark.parametrize("enabled, code", [(True, 2), (False, 0)])
def test_head_without_effect_is_told_as_in_a_run(
    enabled: bool, code: int, config_file: Callable, capsys: pytest.CaptureFixture
) -> None:
    path = config_file("retinanet", "retinanet", ["PKD", "MGD"], DISTILL__MGD__LOSS_WEIGHT=1e-30)
    assert doctor.main(["--config-file", path, "DISTILL.LIVENESS.ENABLED", str(enabled)]) == code
    out, error = capsys.readouterr()
    assert out.endswith("It can be run.\n") == (not enabled)
    message = r"On images of noise: .* steps of MGD, .* A run looks at this in its first 3 steps"
    assert bool(re.search(message, error)) == enabled and "steps of PKD" not in error


def test_step_that_mixed_precision_skips_tells_nothing_of_a_head(
    config_file: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = config_file("retinanet", "retinanet", ["MGD"], DISTILL__MGD__LOSS_WEIGHT=1e-30)
    assert doctor.main(["--config-file", path]) == 2
    scales = (2.0**-x for x in range(99))
    monkeypatch.setattr(doctor, "loss_scale", lambda trainer: next(scales))
    assert doctor.main(["--config-file", path]) == 0


def test_images_that_a_run_does_not_resize_are_of_some_size(
    config_file: Callable, capsys: pytest.CaptureFixture
) -> None:
    path = config_file("retinanet", "retinanet", ["PKD"])
    assert doctor.main(["--config-file", path, "INPUT.MIN_SIZE_TRAIN", "(0,)"]) == 0
    assert "images of 320x" in capsys.readouterr().out


def test_run_costs_what_a_step_does_in_proportion_to_its_batch() -> None:
    # 0.5 s for 2 images are 4 s for 16; 90,000 times that are 360,000 s, or 100 hours.
    cfg = load_config(opts=["SOLVER.IMS_PER_BATCH", 16, "SOLVER.MAX_ITER", 90000])
    text = doctor._estimate(cfg, doctor.Cost(0.5, 10.0, images=2, size=(64, 85)))
    assert "0.50 s a step of 2 images of 64x85" in text and "at most 10 MiB" in text
    assert "4.00 s for a batch of 16" in text and "4 days, 4:00:00 for 90000 iterations" in text


@pytest.mark.parametrize(
    "share, images, expected",
    # Of a batch of 8; where there are both kinds, at least one of each is tried out.
    [(0.25, 4, 1), (0.25, 2, 1), (0.75, 4, 3), (0.75, 2, 1), (1.0, 3, 3)],
)
def test_images_without_labels_have_their_share_of_those_tried_out(
    share: float, images: int, expected: int
) -> None:
    keys = {"SETS": ["a_folder"], "SHARE": share}
    values = {f"DISTILL__UNLABELLED__{k}": v for k, v in keys.items()}
    cfg = distill_config("retinanet", [], ["PKD"], SOLVER__IMS_PER_BATCH=8, **values)
    assert doctor._count_unlabelled(cfg, images) == expected


def test_saving_of_an_option_is_what_a_step_gets_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a step of 6 s the teacher takes 3. With 1 s it would be 2/6 shorter, with 4 s 1/6 longer.
    now, plain = (Teacher(nn.Linear(1, 1), "BGR", {}) for _ in range(2))
    seconds = dict(zip((x[:2] for x in teacher_savings.TRIED.values()), (1.0, 4.0, 2.5)))
    clock = [0.0]

    def answer(distiller: Any, lesson: Any, inputs: Any, teacher: Teacher) -> None:
        clock[0] += 3.0 if teacher is now else seconds[teacher.options[:2]]

    monkeypatch.setattr(teacher_savings, "teacher_answers", answer)
    monkeypatch.setattr(
        teacher_savings, "with_options", lambda x, options: replace(x, options=options)
    )
    monkeypatch.setattr(teacher_savings, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    text = teacher_savings.teacher_savings(
        None, SimpleNamespace(teacher=now), plain, [], 6.0, False
    )
    assert "The teacher takes 3.000 s of it, 50%" in text
    rows = re.findall(r"^(\S.*?)  +([\d.]+) s +([+-]\d+)%", text, re.MULTILINE)
    assert rows == [
        ("FOLD_NORMS", "1.000", "+33"),
        ("CHANNELS_LAST", "4.000", "-17"),
        ("FOLD_NORMS and CHANNELS_LAST", "2.500", "+8"),
    ]


@pytest.mark.parametrize(
    "values",
    [
        {
            "MODEL__KEYPOINT_ON": True,
            "MODEL__ROI_KEYPOINT_HEAD__NUM_KEYPOINTS": 5,
            "MODEL__ROI_KEYPOINT_HEAD__CONV_DIMS": (16,),
        },
        {
            "MODEL__LOAD_PROPOSALS": True,
            "MODEL__PROPOSAL_GENERATOR__NAME": "PrecomputedProposals",
        },
    ],
    ids=["keypoints", "proposals"],
)
def test_noise_has_all_that_a_student_learns_from(
    values: dict, config_file: Callable, capsys: pytest.CaptureFixture
) -> None:
    assert (
        doctor.main(["--config-file", config_file("faster_rcnn", "faster_rcnn", ["PKD"], **values)])
        == 0
    )
    assert "loss_pkd" in capsys.readouterr().out


@pytest.mark.parametrize("share, own", [(0.5, True), (1.0, False)])
def test_images_without_labels_are_among_those_of_noise(
    share: float,
    own: bool,
    config_file: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "more").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "more" / "a.png")
    values = {"SETS": [str(tmp_path / "more")], "SHARE": share, "BOX_SCORE": 0.01}
    values = {f"DISTILL__UNLABELLED__{k}": v for k, v in values.items()}
    values["MODEL__RETINANET__NORM"] = ""  # of a single cell there is nothing to normalise
    path = config_file("retinanet", "retinanet", ["PKD", "FGD"], **values)
    assert doctor.main(["--config-file", path, "--images", "3"]) == 0
    text = capsys.readouterr().out
    value = re.search(r"\nstudent's own +(\S+)", text).group(1)
    assert (float(value) > 0) == own and "loss_fgd_foreground" in text
    if own:
        assert doctor.main(["--config-file", path, "--images", "1"]) == 2
        assert "--images 1: a batch has labelled and unlabelled" in capsys.readouterr().err


def test_noise_tells_nothing_of_the_levels_on_which_objects_lie(
    forget: None, capsys: pytest.CaptureFixture
) -> None:
    # Its boxes are of at most half of the height; those of the user's objects may be of all of it.
    words = ["--config-file", "configs/quickstart/mgd.yaml", "DISTILL.LEVELS", "[]"]
    assert doctor.main([*words, "SOLVER.IMS_PER_BATCH", "2"]) == 0
    text = capsys.readouterr().out
    assert "loss_mgd" in text and "no object" not in text and "DISTILL.LEVELS" not in text


def test_images_without_labels_that_cannot_be_read_are_told(
    config_file: Callable, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "empty").mkdir()
    sets = {"DISTILL__UNLABELLED__SETS": [str(tmp_path / "empty")], "MODEL__RETINANET__NORM": ""}
    assert doctor.main(["--config-file", config_file("retinanet", "retinanet", ["PKD"], **sets)])
    assert "DISTILL.UNLABELLED.SETS[0] IMAGES" in capsys.readouterr().err


def test_what_the_student_starts_from_is_loaded_as_in_a_run(
    config_file: Callable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, weights = config_file("retinanet", "retinanet", ["PKD"]), str(tmp_path / "student.pth")
    torch.save(build_model(load_config(path)).student.state_dict(), weights)
    assert doctor.main(["--config-file", path]) == 0
    assert "channel i" not in caplog.text
    assert doctor.main(["--config-file", path, "MODEL.WEIGHTS", weights]) == 0
    assert "channel i PKD will compare" in caplog.text


def test_weights_of_the_student_that_are_not_there_are_told(
    config_file: Callable, capsys: pytest.CaptureFixture
) -> None:
    path = config_file("retinanet", "retinanet", ["PKD"])
    assert doctor.main(["--config-file", path, "MODEL.WEIGHTS", "nowhere.pth"]) == 2
    assert "MODEL.WEIGHTS: there is no file 'nowhere.pth'" in capsys.readouterr().err


def test_every_head_is_listed_with_its_reason(
    config_file: Callable, capsys: pytest.CaptureFixture
) -> None:
    assert doctor.main(["--config-file", config_file("retinanet", "faster_rcnn", ["PKD"])]) == 0
    table = capsys.readouterr().out.split("Heads for this pair:")[1].split("Losses")[0]
    found = dict(re.findall(r"^(\w+)\s+(used|fits|no)\b", table, re.MULTILINE))
    assert sorted(found) == head_names()
    assert found["PKD"] == "used" and found["MGD"] == "fits" and found["DKD"] == "no"
    assert "DKD takes two-stage -> two-stage" in table


@pytest.mark.parametrize(
    "opts, words",
    [
        (["DISTILL.TEACHER.WEIGHTS", "gone.pth"], "DISTILL.TEACHER.WEIGHTS: there is no file"),
        (["DISTILL.HEADS", "['DKD']"], "DKD takes two-stage -> two-stage.*Heads that fit"),
        (["DISTILL.HAEDS", "['PKD']"], "did you mean DISTILL.HEADS"),
        (["MODEL.FPN.OUT_CHANELS", "3"], "did you mean MODEL.FPN.OUT_CHANNELS"),
        (["SOLVER.MAX_ITER", str(10**15)], f"SOLVER.MAX_ITER must be .*got {10**15}"),
    ],
)
def test_what_is_wrong_is_the_last_line_and_the_exit_code(
    opts: List[str], words: str, config_file: Callable, capsys: pytest.CaptureFixture
) -> None:
    assert (
        doctor.main(["--config-file", config_file("retinanet", "retinanet", ["PKD"]), *opts]) == 2
    )
    assert re.search(f"d2kd doctor: error: .*{words}", capsys.readouterr().err)


COCO = "[{'NAME': 'gone', 'JSON': 'gone.json', 'IMAGES': '.'}]"


@pytest.mark.parametrize(
    "opts, words",
    [
        (
            ["DATASETS.TRAIN", "('nowhere',)"],
            "DATASETS.TRAIN: no data set is registered as 'nowhere'",
        ),
        (
            ["DATASETS.COCO_FORMAT", COCO, "DATASETS.TEST", "('gone',)"],
            r"DATASETS.COCO_FORMAT\[0\]: the annotation file of gone is missing: .*/gone.json",
        ),
        (
            ["DATASETS.TRAIN", "('d2kd_shapes_train',)"],
            "MODEL.RETINANET.NUM_CLASSES is 3, but data set d2kd_shapes_train has 6 classes",
        ),
        (
            ["DATASETS.TEST", "('d2kd_shapes_val',)", "DATASETS.SHAPES.NOISE", "-1.0"],
            r"DATASETS.SHAPES.NOISE must be in \[0, 255\], got -1.0",
        ),
    ],
)
def test_data_that_is_not_there_or_does_not_fit_is_told_behind_the_plan(
    opts: List[str],
    words: str,
    config_file: Callable,
    forget: None,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
) -> None:
    path = config_file("retinanet", "retinanet", ["PKD"])
    before = sorted(tmp_path.iterdir())
    root = ["DATASETS.SHAPES.ROOT", str(tmp_path)] if "d2kd_shapes" in str(opts) else []
    assert doctor.main(["--config-file", path, *root, *opts]) == 2
    said = capsys.readouterr()
    for part in ("Heads for this pair:", "loss_pkd", "s a step of 2 images"):
        assert part in said.out
    assert re.fullmatch(f"d2kd doctor: error: {words}.*\n", said.err)
    assert sorted(tmp_path.iterdir()) == before, "nothing is written"


def test_folder_of_the_teacher_is_not_the_run_s(
    config_file: Callable, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    path = config_file("retinanet", "retinanet", ["PKD"])
    weights = (tmp_path / "retinanet.pth").rename(tmp_path / "model_final.pth")
    words = ["--config-file", path, "DISTILL.TEACHER.WEIGHTS", str(weights)]
    assert doctor.main([*words, "OUTPUT_DIR", str(tmp_path)]) == 2
    assert "has the teacher's model_final.pth" in capsys.readouterr().err


def test_forgotten_number_of_classes_is_not_blamed_on_the_teacher(
    config_file: Callable, forget: None, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    write_set(tmp_path, "pets")  # two classes; the teacher has them, and the student has 80
    path = config_file("retinanet", "retinanet", ["BCKD"], MODEL__RETINANET__NUM_CLASSES=80)
    pets = {"NAME": "pets", "JSON": f"{tmp_path}/pets.json", "IMAGES": f"{tmp_path}/pets"}
    opts = ["DATASETS.COCO_FORMAT", str([pets]), "DATASETS.TRAIN", "('pets',)"]
    assert doctor.main(["--config-file", path, *opts]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "MODEL.RETINANET.NUM_CLASSES is 80, but data set pets has 2 classes" in said
    # Where it is right, what is wrong with the pair is told.
    opts += ["MODEL.RETINANET.NUM_CLASSES", "2"]
    assert doctor.main(["--config-file", path, *opts]) == 2
    assert "BCKD compares class logits, but" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, words",
    [
        (second("annotations", area="x"), "annotation 2 has the area 'x'"),
        (second("images", width=63), "val/2.png has 64x48 pixels"),
        (second("images", file_name="gone.png"), "missing at .*val/gone.png"),
        (second("categories", name="ape"), "set val has 2 classes .*but train"),
    ],
)
def test_test_set_that_a_run_would_stumble_over_at_its_end_is_told(
    change: Callable, words: str, tmp_path: Path, forget: None
) -> None:
    write_set(tmp_path, "train")
    write_set(tmp_path, "val", change)
    cfg = name_sets(load_config(opts=["MODEL.DEVICE", "cpu"]), tmp_path, ["train"], ["val"])
    with pytest.raises((ValueError, OSError), match=words):
        doctor.check_data(cfg)


def test_built_in_shapes_are_not_drawn(
    config_file: Callable, forget: None, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    path = config_file("retinanet", "retinanet", ["PKD"], MODEL__RETINANET__NUM_CLASSES=6)
    before = sorted(tmp_path.iterdir())
    opts = ["DATASETS.SHAPES.ROOT", str(tmp_path), "DATASETS.TRAIN", "('d2kd_shapes_train',)"]
    assert doctor.main(["--config-file", path, *opts]) == 0
    assert sorted(tmp_path.iterdir()) == before and "d2kd_shapes_train" not in DatasetCatalog


def test_each_stage_is_tried_out(config_file: Callable, capsys: pytest.CaptureFixture) -> None:
    stages = [{"ITERATIONS": 3}, {"ITERATIONS": 3, "HEADS": ["MGD"]}]
    path = config_file(
        "retinanet",
        "retinanet",
        ["PKD"],
        SOLVER__MAX_ITER=6,
        SOLVER__STEPS=(2,),
        SOLVER__WARMUP_ITERS=1,
    )
    assert doctor.main(["--config-file", path, "DISTILL.STAGES", str(stages)]) == 0
    first, second = capsys.readouterr().out.split("Stage 2")
    assert "loss_pkd" in first and "loss_mgd" in second


def test_student_alone_is_nothing_to_look_at_but_its_data(
    config_file: Callable, forget: None, capsys: pytest.CaptureFixture
) -> None:
    words = ["--config-file", config_file("retinanet", "retinanet", ["PKD"])]
    words += ["DISTILL.ENABLED", "False"]
    assert doctor.main(words) == 0
    text = capsys.readouterr().out
    assert "no distillation to look at" in text and text.endswith("\nIt can be run.\n")
    assert doctor.main([*words, "DATASETS.TRAIN", "('nowhere',)"]) == 2
    said = capsys.readouterr()
    assert "no data set is registered as 'nowhere'" in said.err and "can be run" not in said.out


def test_mask_rcnn_gets_masks(config_file: Callable, capsys: pytest.CaptureFixture) -> None:
    path = config_file("mask_rcnn", "mask_rcnn", ["DKD"])
    assert doctor.main(["--config-file", path]) == 0
    assert "loss_dkd_target" in capsys.readouterr().out
