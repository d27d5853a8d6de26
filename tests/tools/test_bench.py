"""A bench that is killed goes on; what is finished is not repeated, what is changed is run."""

import fcntl
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import pytest
import yaml

from tests.helpers.forks import python
from tests.helpers.runs import run_config
from tests.helpers.toys import stock_backbone

pytestmark = pytest.mark.process

# Stands for train_net.py: it says what it is asked, goes on where it was killed, and takes no time.
FAKE = """
import json, os, pathlib, sys, time
words = sys.argv[1:]
said = dict(zip(words[-2::-2], words[::-2]))  # KEY VALUE, from the end
folder = pathlib.Path(said["OUTPUT_DIR"])
folder.mkdir(exist_ok=True)
place = pathlib.Path(__file__).parent
with open(place / "calls.txt", "a") as file:
    file.write(("test" if "--eval-only" in words else "val") + " " + folder.name + "\\n")
if "--resume" in words:
    last, log = folder / "last", folder / "metrics.json"
    first = int(last.read_text()) if last.exists() else 0
    for i in range(first, int(said["SOLVER.MAX_ITER"])):
        with open(log, "a") as file:
            file.write(json.dumps({"iteration": i, "time": 0.5}) + "\\n")
        last.write_text(str(i + 1))
        while (place / "hang").exists() and i == 1:
            time.sleep(0.05)
    if said["SEED"] == "13":
        sys.exit("unlucky")
    (folder / "model_final.pth").write_text("weights")
else:  # the end of the training
    assert pathlib.Path(said["MODEL.WEIGHTS"]).read_text() == "weights"
ap = 30 + int(said["SEED"]) + 10 * ("--eval-only" in words)
print("[1]: copypaste: Task: bbox")
print("[1]: copypaste: AP,AP50,AP75,APs,APm,APl")
print(f"[1]: copypaste: {ap},60.0,30.0,nan,20.0,30.0")
"""


@pytest.fixture
def place(tmp_path: Path, tool: Callable, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(tool("bench_steps"), "TRAIN_NET", str(tmp_path / "fake.py"))
    cfg = run_config(tmp_path)
    cfg.DATASETS.TEST = ("d2kd_shapes_val",)
    (tmp_path / "student.yaml").write_text(cfg.dump())
    return tmp_path


def write(place: Path, **said: Any) -> str:
    rows = [{"NAME": "alone", "CONFIG": str(place / "student.yaml")}]
    content = {
        "RESULTS": str(place / "results.csv"),
        "OUTPUT_DIR": str(place / "output"),
        "TEST": "d2kd_shapes_test",
        "SEEDS": [1, 2],
        "ITERATIONS": [4],
        "ROWS": rows,
    }
    (place / "table.yaml").write_text(yaml.dump({**content, **said}))
    return str(place / "table.yaml")


def calls(place: Path) -> List[str]:
    path = place / "calls.txt"
    return [x.split()[0] for x in path.read_text().splitlines()] if path.exists() else []


def results(tool: Callable, place: Path) -> List[Dict[str, str]]:
    return tool("bench_results").read_results(str(place / "results.csv"))


def bench(tool: Callable, *words: str) -> int:
    return tool("bench").main([*words, "--every", "0.1"])


def test_each_run_is_a_row_with_its_figures_and_how_they_came_about(
    tool: Callable, place: Path, capsys: pytest.CaptureFixture
) -> None:
    assert bench(tool, write(place, OPTS=["SOLVER.BASE_LR", 0.5]), "--jobs", "2") == 0
    rows = sorted(results(tool, place), key=lambda x: x["seed"])
    assert [(x["val_AP"], x["test_AP"]) for x in rows] == [
        ("31.000", "41.000"),
        ("32.000", "42.000"),
    ]
    first = rows[0]
    assert (first["row"], first["iterations"], first["seconds"]) == ("alone", "4", "2")
    assert first["opts"] == "SOLVER.BASE_LR 0.5" and first["test_APs"] == "nan"
    assert f"{place}/student.yaml SOLVER.BASE_LR 0.5 SOLVER.MAX_ITER 4 SEED 1" in first["command"]
    for key in ("commit", "dirty", "detectron2", "torch", "hardware", "date", "key", "recipe"):
        assert first[key], key
    assert first["recipe"] == rows[1]["recipe"]
    said = capsys.readouterr().out
    assert "2 cells, 0 finished, 2 to run" in said and "[2/2 cells] 8 of 8 iterations" in said


def test_command_of_a_row_gives_its_words_back_to_a_shell(tool: Callable, place: Path) -> None:
    values = ["DATASETS.SHAPES.ROOT", str(place / "a folder"), "SOLVER.STEPS", [1, 2]]
    assert bench(tool, write(place, SEEDS=[1], OPTS=values)) == 0
    words = shlex.split(results(tool, place)[0]["command"])
    assert words[4:8] == list(map(str, values))


def test_set_that_a_table_reports_may_be_added_later(tool: Callable, place: Path) -> None:
    bench(tool, write(place, SEEDS=[1], TEST=""))
    assert [x["test_AP"] for x in results(tool, place)] == [""]
    table = write(place, SEEDS=[1])
    bench(tool, table)
    assert calls(place) == ["val", "test"], "what is trained is not trained again"
    assert results(tool, place)[-1]["test_AP"] == "41.000"
    bench(tool, table)
    bench(tool, write(place, SEEDS=[1], TEST=""))
    assert len(calls(place)) == len(results(tool, place)) == 2


def test_finished_runs_are_not_repeated_and_changed_ones_are_run(
    tool: Callable, place: Path
) -> None:
    bench(tool, write(place))
    assert calls(place) == ["val", "test"] * 2
    bench(tool, write(place, OUTPUT_DIR=str(place / "elsewhere")))
    assert len(calls(place)) == 4, "known by what is in the CSV"
    bench(tool, write(place, SEEDS=[1, 2, 3]))
    assert len(calls(place)) == 6
    bench(tool, write(place, SEEDS=[1], OPTS=["SOLVER.BASE_LR", 0.5]))
    assert len(calls(place)) == 8 and len(results(tool, place)) == 4


def test_run_that_fails_is_told_and_does_not_stop_the_others(
    tool: Callable, place: Path, capsys: pytest.CaptureFixture
) -> None:
    table = write(place, SEEDS=[13, 2])
    assert bench(tool, table) == 1
    said = capsys.readouterr().out
    assert "FAILED: alone, 4 iterations, seed 13\nunlucky" in said
    assert [x["seed"] for x in results(tool, place)] == ["2"]
    assert bench(tool, table) == 1, "it is tried again"


def test_run_that_says_no_figure_is_told(
    tool: Callable, place: Path, capsys: pytest.CaptureFixture
) -> None:
    (place / "fake.py").write_text(FAKE.replace("copypaste: Task: bbox", "nothing"))
    assert bench(tool, write(place, SEEDS=[1])) == 1 and results(tool, place) == []
    assert "no evaluation of boxes in what it said" in capsys.readouterr().out


def wait_until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def start(tool: Callable, table: str) -> multiprocessing.Process:
    """A bench in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=bench, args=(tool, table))
    process.start()
    return process


def is_locked(place: Path) -> bool:
    with open(next(place.glob("output/*/lock")), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_bench_goes_on_where_it_was_and_takes_over_what_outlived_it(
    how: signal.Signals, tool: Callable, place: Path
) -> None:
    (place / "hang").touch()
    table = write(place, SEEDS=[1])
    process = start(tool, table)
    wait_until(lambda: any(x.read_text() == "2" for x in place.glob("output/*/last")))
    os.kill(process.pid, how)
    process.join()
    # The run of a bench that could not stop it is alive, and nobody starts it a second time.
    assert is_locked(place) == (how == signal.SIGKILL)
    assert results(tool, place) == []
    os.remove(place / "hang")
    assert bench(tool, table) == 0
    assert calls(place) == ["val", "val", "test"]
    log = next(place.glob("output/*/metrics.json")).read_text().splitlines()
    assert len(log) == 4, "each iteration once"
    assert [x["val_AP"] for x in results(tool, place)] == ["31.000"]


def test_cell_in_other_hands_comes_last(tool: Callable, place: Path) -> None:
    table = write(place)
    taken = tool("bench_cells").read_table(table)
    folder = Path(taken.folder(taken.cells[0]))
    folder.mkdir(parents=True)
    other = start_lock(folder)
    assert bench(tool, table) == 0
    other.wait()
    assert [x["seed"] for x in results(tool, place)] == ["2", "1"]


def start_lock(folder: Path) -> subprocess.Popen:
    """A process that has the lock for as long as the other cell takes at least."""
    code = (
        "import fcntl, time, pathlib\n"
        f"folder = pathlib.Path({str(folder)!r})\n"
        "lock = open(folder / 'lock', 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "(folder / 'taken').touch()\n"
        "while not list(folder.parent.glob('*seed_2*/test.json')): time.sleep(0.02)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    wait_until((folder / "taken").exists)
    return process


def test_list_runs_nothing(tool: Callable, place: Path, capsys: pytest.CaptureFixture) -> None:
    bench(tool, write(place, SEEDS=[2]))
    before = calls(place)
    assert bench(tool, write(place), "--list") == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if "seed" in x][-2:]
    assert lines[0].startswith("to run") and lines[1].startswith("finished")
    assert calls(place) == before


def test_mistake_in_the_last_row_is_told_before_the_first_is_run(
    tool: Callable, place: Path
) -> None:
    with pytest.raises(ValueError, match="TEST is 'd2kd_shape_test'"):
        bench(tool, write(place, TEST="d2kd_shape_test"))
    with pytest.raises(SystemExit):
        bench(tool, write(place), "--jobs", "0")
    assert calls(place) == []


def test_run_that_goes_on_with_other_code_has_both_commits(
    tool: Callable, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write(place, SEEDS=[13])
    bench(tool, table)
    (place / "fake.py").write_text(FAKE.replace('== "13"', '== "14"'))
    how = dict.fromkeys(("commit", "d2kd", "detectron2", "torch", "hardware", "date"), "new")
    monkeypatch.setattr(tool("bench_steps"), "provenance", lambda *_: {**how, "dirty": "no"})
    assert bench(tool, table) == 0
    assert results(tool, place)[0]["commit"].endswith(" new")


@pytest.mark.parametrize("first, then, told", [("yes", "no", "yes"), ("no", "yes", "yes")])
def test_run_that_began_or_went_on_with_code_that_is_not_committed_says_so(
    first: str,
    then: str,
    told: str,
    tool: Callable,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table, steps = write(place, SEEDS=[13]), tool("bench_steps")
    how = steps.provenance("cpu", str(place / "results.csv"))
    for dirty in (first, then):
        monkeypatch.setattr(steps, "provenance", lambda *_: {**how, "dirty": dirty})
        bench(tool, table)
        (place / "fake.py").write_text(FAKE.replace('== "13"', '== "14"'))
    assert [x["dirty"] for x in results(tool, place)] == [told]


def test_several_runs_at_a_time_are_refused_on_a_gpu(
    tool: Callable, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool("bench"), "check_table", lambda table: None)  # which asks for the GPU
    table = write(place, OPTS=["MODEL.DEVICE", "cuda"])
    with pytest.raises(ValueError, match="--jobs: runs on a GPU go one after the other"):
        bench(tool, table, "--jobs", "2")
    assert calls(place) == []


def test_train_net_is_what_the_bench_runs(
    tool: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Any, words: List[str], said: str, lock: Any) -> int:
        return python([tool("bench_steps").TRAIN_NET, *words], Path(said))

    monkeypatch.setattr(tool("bench_steps").Children, "run", run)
    schedule = {"SOLVER__MAX_ITER": 1, "SOLVER__STEPS": (), "SOLVER__WARMUP_ITERS": 0}
    cfg = run_config(tmp_path, **schedule, **stock_backbone("retinanet"))
    cfg.DATASETS.TEST, cfg.DATASETS.SHAPES.NUM_TEST = ("d2kd_shapes_val",), 4
    (tmp_path / "student.yaml").write_text(cfg.dump())
    assert bench(tool, write(tmp_path, SEEDS=[1], ITERATIONS=[2])) == 0
    (row,) = results(tool, tmp_path)
    assert float(row["val_AP"]) >= 0 and float(row["test_AP"]) >= 0
    folder = next(tmp_path.glob("output/alone_2_seed_1_*"))
    assert (folder / "model_final.pth").is_file()
    assert "Start inference on 4" in (folder / "test.txt").read_text()


def test_progress_counts_iterations_once_and_leaves_out_a_line_that_is_cut_off(
    tool: Callable, tmp_path: Path
) -> None:
    progress = tool("bench_progress")
    assert progress.iterations_done(str(tmp_path)) == 0
    lines = ['{"iteration": 0, "time": 9}', '{"iteration": 0, "time": 1}', '{"iteration": 1}']
    lines += ['{"iteration": 2, "time": 2}', '{"iteration": 3, "ti']
    (tmp_path / "metrics.json").write_text("\n".join(lines))
    assert progress.iterations_done(str(tmp_path)) == 3
    assert progress.training_seconds(str(tmp_path), 10) == 15, "the killed attempt's is not counted"
    clock = progress.Clock({str(tmp_path): 10})
    assert str(clock) == "3 of 10 iterations, time unknown"
    with open(tmp_path / "metrics.json", "a") as file:
        file.write('me": 2}\n{"iteration": 9, "time": 2}\n')
    assert str(clock) == "10 of 10 iterations, 0 min left"


def test_code_that_is_not_committed_is_told_and_the_csv_is_no_code(
    tool: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tool("bench_results")
    monkeypatch.setattr(module, "ROOT", str(tmp_path))

    def told(results: str = "results.csv") -> List[str]:
        how = module.provenance("cpu", str(tmp_path / results))
        return [how["commit"], how["dirty"]]

    assert told() == ["unknown", "unknown"]
    for name in ("results.csv", "results_samples.csv", "code.py"):
        (tmp_path / name).touch()
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "a"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    (tmp_path / "results.csv").write_text("new row")
    (tmp_path / "results_samples.csv").write_text("of bench_verdict.py")
    assert len(told()[0]) == 10 and told()[1] == "no"
    (tmp_path / "code.py").write_text("changed")
    assert told()[1] == "yes" and told("../elsewhere.csv")[1] == "yes"
