"""
Whole runs on a GPU, with all that watches them.

Not run on a GPU yet, but rehearsed on the CPU (tests/gpu/conftest.py).
"""

from pathlib import Path
from typing import Any, List, Optional

import pytest
import torch

from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from d2kd import doctor
from d2kd.engine import launch, train
from d2kd.engine.run import evaluate
from d2kd.export import export_student
from d2kd.modeling.backbone_teacher import BackboneTeacher
from d2kd.utils.to_device import to_device
from tests.helpers.pretended_cuda import PretendedCuda
from tests.helpers.runs import build_trainer, interrupt, run, run_config, saved, scalars
from tests.helpers.toys import batch, distill_config

# Of a loss after two steps more, where a GPU adds in no fixed order.
TOLERANCE = 1e-3


def config(folder: Path, teacher: List[Any], output: Path, **overrides: Any) -> CfgNode:
    values = {"MODEL__DEVICE": "cuda", "OUTPUT_DIR": str(output), **overrides}
    return run_config(folder, teacher, ["MGD", "PKD"], **values)


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "amp"])
def test_resumed_run_goes_on_as_the_uninterrupted_one(
    amp: bool, folder: Path, teacher: List[Any], tmp_path: Path
) -> None:
    whole, parts = (
        config(folder, teacher, tmp_path / x, SOLVER__AMP__ENABLED=amp) for x in ("whole", "parts")
    )
    expected = scalars(run(whole))
    interrupt(parts, 2)  # saved after iteration 1
    resumed = scalars(run(parts, resume=True))
    for name, values in expected.items():
        wanted = {i: v for i, v in values.items() if i >= 2}
        assert resumed[name] == pytest.approx(wanted, rel=TOLERANCE), name


def test_run_with_stages_evaluation_and_pictures_can_be_evaluated_and_exported(
    folder: Path, teacher: List[Any], tmp_path: Path
) -> None:
    cfg = config(
        folder,
        teacher,
        tmp_path / "run",
        VIS_PERIOD=1,
        DISTILL__LIVENESS__FIRST_STEPS=2,
        DATASETS__TEST=("d2kd_shapes_val",),
        TEST__EVAL_PERIOD=2,
        TEST__BEST_METRIC="bbox/AP",
        SOLVER__STEPS=(),
    )
    cfg.DISTILL.STAGES = [{"ITERATIONS": 2}, {"ITERATIONS": 2, "HEADS": ["PKD"]}]
    results = train(cfg)
    assert "AP" in results["bbox"]
    weights = str(Path(cfg.OUTPUT_DIR) / "model_final.pth")
    alone = cfg.clone()
    alone.MODEL.WEIGHTS = weights
    assert evaluate(alone)["bbox"].keys() == results["bbox"].keys()
    export_student(cfg, weights, str(tmp_path / "exported"))
    assert (tmp_path / "exported" / "student.pth").is_file()


def test_doctor_measures_on_the_gpu(
    teacher: List[Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(distill_config("retinanet", teacher, ["PKD"], MODEL__DEVICE="cuda").dump())
    assert doctor.main(["--config-file", str(path), "--images", "2"]) == 0
    assert " on cuda" in capsys.readouterr().out


def test_save_looks_for_nan_in_one_wait(
    folder: Path, teacher: List[Any], tmp_path: Path, pretended: Optional[PretendedCuda]
) -> None:
    if pretended is None:
        pytest.skip("waits are counted on a pretended GPU")
    trainer = build_trainer(config(folder, teacher, tmp_path / "run"))
    pretended.waits.clear()
    trainer.checkpointer.save("model")
    looks = [n for (what, _), n in pretended.waits.items() if what == "_local_scalar_dense"]
    assert sum(looks) <= 1, pretended.waits


def test_losses_of_a_step_are_fetched_in_one_copy_and_images_are_not_waited_for(
    folder: Path, teacher: List[Any], tmp_path: Path, pretended: Optional[PretendedCuda]
) -> None:
    if pretended is None:
        pytest.skip("waits are counted on a pretended GPU")
    cfg = config(folder, teacher, tmp_path / "run", DISTILL__LIVENESS__ENABLED=False)
    trainer = build_trainer(cfg)
    pretended.waits.clear()
    with EventStorage():
        trainer.run_step()
    waits = [(what, where.split(":")[0]) for what, where in pretended.waits.elements()]
    assert waits.count(("copy to the host", "d2kd/engine/monitor/finite.py")) == 1
    pretended.waits.clear()
    to_device(batch()[0]["image"], torch.device("cuda"))
    assert not pretended.waits


def test_teacher_of_features_on_the_cpu_has_the_images_of_the_gpu() -> None:
    net = pytest.importorskip("timm").create_model("test_vit", num_classes=0)
    teacher, image = BackboneTeacher(net.eval(), [16]), 255 * torch.rand(3, 160, 160)
    found, expected = (
        teacher.preprocess_image([{"image": x}]).tensor for x in (image.to("cuda"), image)
    )
    assert torch.equal(found, expected)


@pytest.mark.process
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_train_to_the_end(folder: Path, teacher: List[Any], tmp_path: Path) -> None:
    cfg = config(folder, teacher, tmp_path / "run")
    build_trainer(cfg)  # draws the data
    launch(train, 2, device="cuda", args=(cfg,))
    assert saved(cfg)["iteration"] == cfg.SOLVER.MAX_ITER - 1
