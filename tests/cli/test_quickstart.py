"""The quickstart: two steps at once, one mistake ends both, how far the student is from its end."""

import json
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path
from typing import Callable, Dict, List, Sequence, Tuple

import pytest

from d2kd import load_config
from d2kd.cli import quickstart
from d2kd.cli.steps import METRICS, Steps, stop_on_sigterm

ALONE, DISTILLED = quickstart.STUDENT, "configs/quickstart/cwd.yaml"
FOUND = ["copypaste: Task: bbox", "copypaste: " + ",".join(METRICS), "copypaste: 1,2,3,4,5"]


def steps(*words: str) -> Dict[str, quickstart.Step]:
    return quickstart.plan(quickstart.parse_args(words))[1]


def test_two_steps_run_at_the_same_time() -> None:
    both = threading.Barrier(2, timeout=20)

    class Together(Steps):
        def run(
            self, config_file: str, opts: Sequence[str], weights: str = "", name: str = ""
        ) -> Dict[str, float]:
            both.wait()
            return {"AP": len(opts)}

    opts = ["SEED", "2", "DISTILL.CWD.LOSS_WEIGHT", "3.0"]
    found = quickstart.run_all(Together(), steps(*opts), jobs=2)
    assert list(found.items()) == [("student alone", {"AP": 2}), ("student distilled", {"AP": 4})]


def test_overrides_reach_the_steps_that_read_them() -> None:
    words = ["SEED", "2", "MODEL.DEVICE", "cpu", "DISTILL.CWD.LOSS_WEIGHT", "3.0"]
    first, second = quickstart.plan(quickstart.parse_args(words))
    assert list(first) == ["teacher", "student alone, finished"]
    assert [opts for _, opts, _ in first.values()] == [["MODEL.DEVICE", "cpu"]] * 2
    assert [opts for _, opts, _ in second.values()] == [words[:4], words]
    assert not any(weights for _, _, weights in second.values())


def test_several_teachers_are_refused() -> None:
    args = quickstart.parse_args(["--distilled", "configs/two_teachers/student.yaml"])
    with pytest.raises(ValueError, match="has several teachers"):
        quickstart.plan(args)


def test_one_folder_for_both_students_is_refused() -> None:
    args = quickstart.parse_args(["OUTPUT_DIR", "output/mine"])
    with pytest.raises(ValueError, match="OUTPUT_DIR: .* would both be written to 'output/mine'"):
        quickstart.plan(args)


def test_each_detector_is_drawn_by_the_config_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output" / "quickstart").mkdir(parents=True)
    monkeypatch.setattr(quickstart, "register_datasets", lambda cfg: None)
    monkeypatch.setattr(Steps, "run", lambda *_: dict.fromkeys(METRICS, 1.0))
    drawn: List[tuple] = []
    monkeypatch.setattr(quickstart, "draw_detections", lambda panels, **_: drawn.extend(panels))
    quickstart.main(["MODEL.RETINANET.NUM_CONVS", "7"])
    students = {title for title, cfg, _ in drawn if cfg.MODEL.RETINANET.NUM_CONVS == 7}
    assert students == {"student alone", "student distilled"} and len(drawn) == 4


@pytest.mark.parametrize("own", [(), ("d2kd_shapes_train",)])
def test_all_detectors_are_measured_on_the_set_on_which_nothing_was_chosen(
    own: Tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or on one that is asked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "output" / "quickstart").mkdir(parents=True)
    asked: List[tuple] = []

    def run(self: Steps, config_file: str, opts: Sequence[str], weights: str, *_: str) -> dict:
        asked.append((load_config(config_file, opts).DATASETS.TEST, weights))
        return dict.fromkeys(METRICS, 1.0)

    drawn: List[tuple] = []
    monkeypatch.setattr(Steps, "run", run)
    monkeypatch.setattr(quickstart, "register_datasets", lambda cfg: None)
    monkeypatch.setattr(quickstart, "draw_detections", lambda panels, **_: drawn.extend(panels))
    quickstart.main(["DATASETS.TEST", str(own)] if own else [])
    expected = own or ("d2kd_shapes_test",)
    assert [x for x, _ in asked] == [x.DATASETS.TEST for _, x, _ in drawn] == [expected] * 4
    # And drawn are those that were measured.
    shipped = {weights for _, weights in asked} - {""}
    trained = {f"output/quickstart/{x}/model_final.pth" for x in ("student", "cwd")}
    assert {os.path.normpath(x) for _, _, x in drawn} == shipped | trained and len(shipped) == 2


def test_another_student_has_no_shipped_end() -> None:
    args = quickstart.parse_args(["--student", "configs/quickstart/student_faster_rcnn.yaml"])
    assert list(quickstart.plan(args)[0]) == ["teacher"]


def results(**ap: float) -> Dict[str, Dict[str, float]]:
    names = {
        "finished": quickstart.FINISHED,
        "alone": "student alone",
        "distilled": "student distilled",
    }
    return {names[k]: dict.fromkeys(METRICS, v) for k, v in ap.items()}


@pytest.mark.parametrize(
    "found, told",
    [
        (results(finished=70.0, alone=20.0, distilled=60.0), ["gain: +40.0", "50.0 AP short"]),
        (
            results(finished=70.0, alone=70.5, distilled=72.0),
            ["gain: +1.5", "as good as at the end"],
        ),
        (results(alone=20.0, distilled=18.0), ["gain: -2.0", "neither student is finished"]),
    ],
)
def test_report_says_how_far_the_student_is_from_its_end(
    found: Dict[str, Dict[str, float]], told: List[str]
) -> None:
    report = quickstart.make_report(found, 60.0)
    for words in told:
        assert words in report


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script that runs in place of `python -m d2kd`; the folder is where output goes."""
    script = tmp_path / "script"
    monkeypatch.setattr(sys, "executable", str(script))
    return script


def write(script: Path, *lines: str) -> None:
    script.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    script.chmod(0o755)


def test_a_mistake_in_one_ends_the_other(
    scripted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    mistake = 'case "$*" in *cwd*) sleep 1; echo "DISTILL.X is wrong"; exit 2;; esac'
    write(scripted, mistake, "exec sleep 100")
    begin = time.monotonic()
    with pytest.raises(SystemExit) as ended:
        quickstart.run_all(Steps(), steps(), jobs=2)
    assert ended.value.code == 2 and time.monotonic() - begin < 50
    assert capsys.readouterr().err == "DISTILL.X is wrong\n"


def run_one(folder: Path) -> None:
    Steps().run(ALONE, ["OUTPUT_DIR", str(folder / "run")])


def run_two(folder: Path) -> None:
    pair = {x: (ALONE, ["OUTPUT_DIR", str(folder / x)], "") for x in ("a", "b")}
    quickstart.run_all(Steps(), pair, jobs=2)


def until_sigterm(script: Path, run: Callable[[Path], None]) -> None:
    """For a process of its own: what is set here stays so."""
    sys.executable = str(script)
    stop_on_sigterm()
    run(script.parent)


@pytest.mark.process
@pytest.mark.parametrize("run, count", [(run_one, 1), (run_two, 2)])
def test_sigterm_ends_what_was_started(
    run: Callable[[Path], None], count: int, tmp_path: Path
) -> None:
    trap = f'trap "kill $!; touch {tmp_path}/ended$$; exit" TERM'
    asleep = "sleep 100 > /dev/null 2>&1 &"
    write(tmp_path / "script", asleep, trap, f"touch {tmp_path}/begun$$", "wait")
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=until_sigterm, args=(tmp_path / "script", run))
    process.start()
    wait_for(tmp_path, "begun*", count)
    process.terminate()
    process.join(60)
    assert process.exitcode == 1
    wait_for(tmp_path, "ended*", count)


def wait_for(folder: Path, pattern: str, count: int) -> None:
    end = time.monotonic() + 60
    while len(list(folder.glob(pattern))) < count:
        assert time.monotonic() < end, pattern
        time.sleep(0.1)


def test_a_finished_step_is_not_repeated(
    scripted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(scripted, *(f"echo '{x}'" for x in FOUND), "echo $OMP_NUM_THREADS > threads")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    opts = ["OUTPUT_DIR", str(tmp_path)]
    found = Steps().run(ALONE, opts)
    assert found == dict(zip(METRICS, [1, 2, 3, 4, 5]))
    assert Path("threads").read_text() == "1\n"
    write(scripted, "exit 1")
    assert Steps().run(ALONE, opts) == found
    with pytest.raises(SystemExit, match="failed"):
        Steps(fresh=True).run(ALONE, opts)
    with pytest.raises(SystemExit, match="failed"):
        Steps().run(ALONE, [*opts, "SEED", "9"])


@pytest.mark.parametrize("fresh, seed", [(True, "1"), (False, "9")])
def test_a_finished_step_is_not_taken_for_done_once_another_has_begun_in_its_folder(
    fresh: bool, seed: str, scripted: Path, tmp_path: Path
) -> None:
    # That one may have written over its weights and its detections before it was interrupted.
    opts = ["OUTPUT_DIR", str(tmp_path), "SEED"]
    write(scripted, *(f"echo '{x}'" for x in FOUND))
    Steps().run(ALONE, [*opts, "1"])
    write(scripted, "exit 1")
    with pytest.raises(SystemExit, match="failed"):
        Steps(fresh).run(ALONE, [*opts, seed])
    with pytest.raises(SystemExit, match="failed"):
        Steps().run(ALONE, [*opts, "1"])


def test_trained_weights_are_evaluated_and_nothing_is_written_over(
    scripted: Path, tmp_path: Path
) -> None:
    write(scripted, *(f"echo '{x}'" for x in FOUND), f'echo "$*" > {tmp_path}/words')
    run, weights = tmp_path / "run", tmp_path / "weights.pth"
    opts = ["OUTPUT_DIR", str(run), "MODEL.WEIGHTS", "start.pth"]
    weights.write_text("trained")
    assert Steps().run(ALONE, opts, str(weights)) == dict(zip(METRICS, [1, 2, 3, 4, 5]))
    words = (tmp_path / "words").read_text().split()
    assert words[2] == "eval"
    last = load_config(ALONE, words[words.index(ALONE) + 1 :])
    assert (last.MODEL.WEIGHTS, last.OUTPUT_DIR) == (str(weights), f"{run}/evaluation")
    assert not (run / "quickstart.json").exists(), "nothing was trained"
    weights.unlink()
    Steps().run(ALONE, opts, str(weights))
    assert (tmp_path / "words").read_text().split()[2] == "train"


def test_an_interrupted_step_is_gone_on_with_and_another_begins_anew(
    scripted: Path, tmp_path: Path
) -> None:
    write(scripted, *(f"echo '{x}'" for x in FOUND), f'echo "$*" >> {tmp_path}/words')
    run = tmp_path / "run"
    run.mkdir()
    opts = ["OUTPUT_DIR", str(run)]
    (run / "config.yaml").write_text(load_config(ALONE, opts).dump())
    for name, seed, resumes in (
        ("nothing", "1", False),
        ("last_checkpoint", "2", False),
        ("last_checkpoint", "1", True),
    ):
        (run / name).write_text("model_0000001.pth")
        Steps().run(ALONE, [*opts, "SEED", seed], plugins=["head.py"])
        words = (tmp_path / "words").read_text().splitlines()[-1]
        assert ("--resume" in words) is resumes and "--plugin head.py" in words
        (run / "quickstart.json").unlink()


@pytest.mark.parametrize(
    "edited", ["head.py", "teacher.pth", "teacher.yaml", "base.yaml", "train.json", "val.json"]
)
def test_a_step_with_another_head_teacher_or_labels_is_neither_finished_nor_gone_on_with(
    edited: str, scripted: Path, tmp_path: Path
) -> None:
    # The config has the names of these files, and not what is in them.
    write(scripted, *(f"echo '{x}'" for x in FOUND), f'echo "$*" >> {tmp_path}/words')
    run, head, teacher = (tmp_path / x for x in ("run", "head.py", "teacher.pth"))
    opts = ["OUTPUT_DIR", str(run), "DISTILL.TEACHER.WEIGHTS", str(teacher)]
    opts += ["DISTILL.TEACHER.CONFIG_FILE", str(tmp_path / "teacher.yaml")]
    (tmp_path / "teacher.yaml").write_text("_BASE_: base.yaml")
    (tmp_path / "base.yaml").write_text("SEED: 1")
    sets = [
        {"NAME": x, "JSON": str(tmp_path / f"{x}.json"), "IMAGES": str(tmp_path)}
        for x in ("train", "val", "other")
    ]
    opts += ["DATASETS.COCO_FORMAT", str(sets)]
    opts += ["DATASETS.TRAIN", "('train',)", "DATASETS.TEST", "('val',)"]

    def trained() -> List[str]:
        """The command of each training so far."""
        Steps().run(DISTILLED, opts, plugins=[str(head)])
        return (tmp_path / "words").read_text().splitlines()

    head.write_text("SCALE = 1")
    teacher.write_text("weights")
    for entry in sets:
        Path(entry["JSON"]).write_text("{}")
    assert len(trained()) == len(trained()) == 1
    (tmp_path / "other.json").write_text("of a set that is not used")
    assert len(trained()) == 1
    record = run / "files.json"  # as an older version has left it
    record.write_text(json.dumps(json.loads(record.read_text())[:2]))
    assert len(trained()) == 1
    (run / "config.yaml").write_text(load_config(DISTILLED, opts).dump())
    (run / "last_checkpoint").write_text("model_0000001.pth")
    with open(tmp_path / edited, "a") as file:
        file.write("\nVERSION: 2\n")
    words = trained()
    assert len(words) == 2 and "--resume" not in words[1]


@pytest.mark.parametrize(
    "device, cores, load, jobs, told",
    [
        ("cpu", 2, 0.2, 2, False),
        ("cpu", 2, 1.2, 2, True),
        ("cpu", 8, 5.0, 2, False),
        ("cpu", 1, 0.0, 1, False),
        ("cuda", 8, 8.0, 1, False),
    ],
)
def test_busy_cores_are_told(
    device: str,
    cores: int,
    load: float,
    jobs: int,
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    assert quickstart.runs_at_once(device) == jobs
    assert ("busy" in capsys.readouterr().out) == told
