"""A YAML or a command line that nobody reads is refused; nothing in it can run code."""

from pathlib import Path
from typing import Any, List

import pytest
import torch
import yaml

import detectron2
from detectron2.config import get_cfg

from d2kd import add_distill_config, load_config, student_config
from d2kd.config.load import NEWER_KEYS, leaves
from tests.helpers.toys import ROOT


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_detectron2_s_keys_keep_their_defaults() -> None:
    stock, ours = get_cfg(), get_cfg()
    add_distill_config(ours)
    for key, node in stock.items():
        if isinstance(node, dict):
            assert all(k in ours[key] for k in node), key
        else:
            assert ours[key] == node, key
    assert ours.MODEL.RETINANET == stock.MODEL.RETINANET
    assert ours.SOLVER.BASE_LR == stock.SOLVER.BASE_LR


def test_values_come_from_defaults_then_yaml_then_command_line(tmp_path: Path) -> None:
    text = "VERSION: 2\nSOLVER: {BASE_LR: 0.5, MAX_ITER: 7}\nDISTILL: {MGD: {MASK_RATIO: 0.45}}\n"
    cfg = load_config(write(tmp_path / "a.yaml", text), ["SOLVER.MAX_ITER", "9"])
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (0.5, 9)
    assert cfg.DISTILL.MGD.MASK_RATIO == 0.45
    assert cfg.DISTILL.PKD.LOSS_WEIGHT == load_config().DISTILL.PKD.LOSS_WEIGHT


def test_base_is_read_beside_the_yaml(tmp_path: Path) -> None:
    write(tmp_path / "Base.yaml", "VERSION: 2\nSOLVER: {BASE_LR: 0.5, MAX_ITER: 7}\n")
    leaf = write(tmp_path / "leaf.yaml", "_BASE_: Base.yaml\nSOLVER: {MAX_ITER: 8}\n")
    cfg = load_config(leaf)
    assert (cfg.SOLVER.BASE_LR, cfg.SOLVER.MAX_ITER) == (0.5, 8)


@pytest.mark.parametrize(
    "text, message",
    [
        ("DISTILL: {MGD: {MASK_RATE: 0.5}}", r"MASK_RATE \(did you mean DISTILL.MGD.MASK_RATIO\?"),
        ("DISTILL: {HEAD: [MGD]}", r"DISTILL.HEAD \(did you mean DISTILL.HEADS\?"),
        ("DISTILL: {CROSSKD: {DEPTH: 2}}", r"CROSSKD \(did you mean DISTILL.CrossKD\?"),
        ("DISTILL: {MGD: {mask_ratio: 0.5}}", r"ratio \(did you mean DISTILL.MGD.MASK_RATIO\?"),
        ("SOLVER: {BASE_LRR: 0.1}", r"SOLVER.BASE_LRR \(did you mean SOLVER.BASE_LR\?"),
        ("QQQQQQQQ: 1", r"  QQQQQQQQ$"),
        ("INPUT: {MIN_SIZE_TRAIN: (96, 128)}", r"inside {} YAML has no tuples: write \[96, 128\]"),
    ],
)
def test_unknown_key_in_yaml_is_refused_with_the_nearest(
    tmp_path: Path, text: str, message: str
) -> None:
    path = write(tmp_path / "a.yaml", text)
    with pytest.raises(ValueError, match=r"a\.yaml has unknown keys:\n.*" + message):
        load_config(path)


def test_keys_that_a_newer_detectron2_saves_are_told_as_such(tmp_path: Path) -> None:
    text = "FLOAT32_PRECISION: ''\nSOLVER: {RESCALE_INTERVAL: False, BASE_LRR: 0.1}\n"
    if "FLOAT32_PRECISION" in get_cfg():
        assert set(NEWER_KEYS) <= {name for name, _ in leaves(get_cfg())}
        pytest.skip("this Detectron2 has them")
    with pytest.raises(ValueError) as error:
        load_config(write(tmp_path / "a.yaml", text))
    newer = rf"(of a newer Detectron2 than {detectron2.__version__}, which is installed)"
    assert str(error.value).splitlines()[1:] == [
        f"  FLOAT32_PRECISION {newer}",
        f"  SOLVER.RESCALE_INTERVAL {newer}",
        "  SOLVER.BASE_LRR (did you mean SOLVER.BASE_LR?)",
    ]


def test_all_unknown_keys_are_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", "DISTILL: {HEAD: [MGD], LEVEL: []}\nSEEED: 1\n")
    with pytest.raises(ValueError) as error:
        load_config(path)
    assert all(
        f"  {key} " in str(error.value) for key in ("DISTILL.HEAD", "DISTILL.LEVEL", "SEEED")
    )


def test_unknown_key_in_a_base_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "Base.yaml", "SOLVER: {BASE_LRR: 0.1}\n")
    leaf = write(tmp_path / "leaf.yaml", "_BASE_: Base.yaml\n")
    with pytest.raises(ValueError, match="SOLVER.BASE_LRR"):
        load_config(leaf)


def test_unknown_key_on_the_command_line_is_refused_with_the_nearest() -> None:
    message = (
        r"the command line has unknown keys:\n  DISTILL\.HAEDS \(did you mean DISTILL\.HEADS\?\)"
    )
    with pytest.raises(ValueError, match=message):
        load_config(opts=["DISTILL.HAEDS", ["MGD"]])


@pytest.mark.parametrize("key, is_of_a_head", [("Cosine.EPS", True), ("MGD.MASK_RATE", False)])
def test_key_of_a_head_that_is_not_known_is_told_where_it_may_come_from(
    key: str, is_of_a_head: bool
) -> None:
    with pytest.raises(ValueError) as error:
        load_config(opts=[f"DISTILL.{key}", 0.1])
    assert ("--plugin FILE" in str(error.value)) == is_of_a_head


@pytest.mark.parametrize("number", ["3", "-3", 3, "3.0"])
def test_whole_number_is_taken_for_one_with_a_point_where_that_is_the_default(
    number: Any, tmp_path: Path
) -> None:
    path = write(
        tmp_path / "a.yaml", f"DISTILL: {{CWD: {{LOSS_WEIGHT: {number}}}, HEADS: [MGD]}}\n"
    )
    for cfg in (load_config(opts=["DISTILL.CWD.LOSS_WEIGHT", number]), load_config(path)):
        value = cfg.DISTILL.CWD.LOSS_WEIGHT
        assert isinstance(value, float) and value == float(number)


@pytest.mark.parametrize("value", ["x", True, "3.0.1", "[3]"])
def test_what_is_no_number_where_one_is_wanted_is_named(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DISTILL.CWD.LOSS_WEIGHT cannot be"):
        load_config(opts=["DISTILL.CWD.LOSS_WEIGHT", value])
    path = write(tmp_path / "a.yaml", f"DISTILL: {{CWD: {{LOSS_WEIGHT: {value}}}}}\n")
    with pytest.raises(ValueError, match="a.yaml: Type mismatch .* key: DISTILL.CWD.LOSS_WEIGHT"):
        load_config(path)


def test_key_without_value_is_refused() -> None:
    with pytest.raises(ValueError, match=r"KEY VALUE pairs, got \['SOLVER.BASE_LR'\]"):
        load_config(opts=["SOLVER.BASE_LR"])


def test_missing_yaml_is_refused_by_its_name() -> None:
    with pytest.raises(FileNotFoundError, match="'nowhere.yaml' does not exist"):
        load_config("nowhere.yaml")


def test_python_in_place_of_a_yaml_is_refused_by_its_name(tmp_path: Path) -> None:
    path = write(tmp_path / "lazy.py", "model = {'a': 1}\nmodel['b'] = 2\n")
    with pytest.raises(ValueError, match="lazy.py' is Python, .*DISTILL.TEACHER.CONFIG_FILE may"):
        load_config(path)


@pytest.mark.parametrize("where", ["leaf", "base"])
def test_yaml_that_asks_for_python_objects_is_refused_and_runs_nothing(
    tmp_path: Path, where: str
) -> None:
    witness = tmp_path / "witness"
    text = f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{witness}']\n"
    path = write(tmp_path / "a.yaml", text)
    if where == "base":
        path = write(tmp_path / "leaf.yaml", "_BASE_: a.yaml\n")
    with pytest.raises(ValueError, match=r"a\.yaml wants to run code .*os\.mkdir"):
        load_config(path)
    assert not witness.exists()


def test_detectron2_s_own_yaml_may_compute_its_anchors(tmp_path: Path) -> None:
    # Its Base-RetinaNet.yaml asks Python for the sizes of three octaves' thirds.
    zoo = Path(detectron2.__file__).parent / "model_zoo" / "configs"
    path = zoo / "COCO-Detection" / "retinanet_R_50_FPN_1x.yaml"
    if not path.is_file():
        pytest.skip("this Detectron2 comes without its model zoo's configs")
    sizes = [[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128, 256, 512)]
    for config_file in (str(path), write(tmp_path / "leaf.yaml", f"_BASE_: {path}\n")):
        assert load_config(config_file).MODEL.ANCHOR_GENERATOR.SIZES == sizes


@pytest.mark.parametrize("has_gpu, device", [(True, "cuda"), (False, "cpu")])
def test_device_is_a_gpu_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch, has_gpu: bool, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert load_config().MODEL.DEVICE == device
    assert load_config(opts=["MODEL.DEVICE", "cpu"]).MODEL.DEVICE == "cpu"


def test_student_config_is_that_of_the_plain_student() -> None:
    opts: List[Any] = ["MODEL.META_ARCHITECTURE", "Distiller"]
    cfg = load_config(opts=opts + ["DISTILL.STUDENT_META_ARCHITECTURE", "RetinaNet"])
    cfg.freeze()
    assert student_config(cfg).MODEL.META_ARCHITECTURE == "RetinaNet"
    assert cfg.MODEL.META_ARCHITECTURE == "Distiller", "the config itself stays as it is"


def test_a_config_that_was_dumped_loads_again(tmp_path: Path) -> None:
    cfg = load_config(opts=["DISTILL.HEADS", ["MGD"], "DISTILL.LEVELS", [["p3", "p3"]]])
    again = load_config(write(tmp_path / "config.yaml", cfg.dump()))
    # Tuples inside of lists come back as lists.
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())


# The tables of tools/bench.py beside them are no configs.
CONFIGS = sorted(
    set(Path(ROOT, "configs").rglob("*.yaml")) - set(Path(ROOT).glob("configs/bench/*"))
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_config_of_the_repository_has_known_keys_only(path: Path) -> None:
    load_config(str(path))


def test_an_empty_yaml_is_refused_by_name(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing but a comment\n")
    with pytest.raises(ValueError, match="empty.yaml is empty"):
        load_config(str(path))
