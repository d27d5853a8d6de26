"""A table of runs: which runs it asks for, when two are the same, and what is refused in it."""

from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, Iterator, List

import pytest
import yaml

from d2kd import DISTILL_HEAD_REGISTRY
from tests.helpers.runs import run_config
from tests.helpers.toys import write_teacher


@pytest.fixture
def cells(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("bench_cells")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """Writes a table with one row, of a toy student, unless others are given."""
    cfg = run_config(tmp_path)
    cfg.DATASETS.TEST = ("d2kd_shapes_val",)
    (tmp_path / "student.yaml").write_text(cfg.dump())

    def write(**said: Any) -> str:
        rows = [{"NAME": "alone", "CONFIG": str(tmp_path / "student.yaml")}]
        path = tmp_path / "table.yaml"
        path.write_text(yaml.dump({"SEEDS": [1, 2], "ITERATIONS": [4], "ROWS": rows, **said}))
        return str(path)

    return write


def row(tmp_path: Path, name: str = "alone", **said: Any) -> Dict[str, Any]:
    return {"NAME": name, "CONFIG": str(tmp_path / "student.yaml"), **said}


def test_rows_have_the_tables_seeds_and_budgets_or_their_own(
    cells: ModuleType, write: Callable[..., str], tmp_path: Path
) -> None:
    rows = [
        row(tmp_path),
        row(tmp_path, "other", SEEDS=[7], ITERATIONS=[8, 16], OPTS=["VERSION", 2]),
    ]
    table = cells.read_table(write(ROWS=rows, OPTS=["SOLVER.BASE_LR", 0.5]))
    found = [(x.row, x.iterations, x.seed, x.opts) for x in table.cells]
    own, both = ("SOLVER.BASE_LR", "0.5"), ("SOLVER.BASE_LR", "0.5", "VERSION", "2")
    assert found == [
        ("alone", 4, 1, own),
        ("alone", 4, 2, own),
        ("other", 8, 7, both),
        ("other", 16, 7, both),
    ]
    cfg = table.cells[-1].cfg
    assert (cfg.SOLVER.MAX_ITER, cfg.SEED, cfg.SOLVER.BASE_LR) == (16, 7, 0.5)
    assert (table.name, table.results) == ("table", str(tmp_path / "table.csv"))


def test_budget_of_a_row_has_seeds_of_its_own(
    cells: ModuleType, write: Callable[..., str], tmp_path: Path
) -> None:
    rows = [row(tmp_path, ITERATIONS=[4, 8], SEEDS={8: [1, 2, 3]}), row(tmp_path, "other")]
    found = [(x.row, x.iterations, x.seed) for x in cells.read_table(write(ROWS=rows)).cells]
    of_four = [("alone", 4, 1), ("other", 4, 1), ("alone", 4, 2), ("other", 4, 2)]
    assert found == [*of_four, ("alone", 8, 1), ("alone", 8, 2), ("alone", 8, 3)]


def test_a_grid_is_a_row_for_each_combination(
    cells: ModuleType, write: Callable[..., str], tmp_path: Path
) -> None:
    grid = {"SOLVER.BASE_LR": [0.5, 1.0], "SOLVER.GAMMA": [0.1, 0.2]}
    rows = [row(tmp_path, GRID=grid, OPTS=["VERSION", 2]), row(tmp_path, "plain")]
    table = cells.read_table(write(ROWS=rows, SEEDS=[1]))
    values = [(0.5, 0.1), (0.5, 0.2), (1.0, 0.1), (1.0, 0.2)]
    names = [f"alone, BASE_LR {x}, GAMMA {y}" for x, y in values]
    assert list(table.rows) == [*names, "plain"]
    assert [x.row for x in table.cells] == [*names, "plain"]
    assert [(x.cfg.SOLVER.BASE_LR, x.cfg.SOLVER.GAMMA) for x in table.cells[:4]] == values


def test_table_of_the_help_can_be_read(
    cells: ModuleType, tool: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    text = tool("bench").EPILOG.split("A table is a YAML:")[1].split("A finished run")[0]
    said = yaml.safe_load(text)
    said["ROWS"] = [x for x in said["ROWS"] if "PLUGIN" not in x]  # whose files are the reader's
    (tmp_path / "help.yaml").write_text(yaml.dump(said))
    table = cells.read_table(str(tmp_path / "help.yaml"))
    assert len(table.rows) == 5 and f'"{table.rows[2]}"' in text
    cfgs = {(x.row, x.iterations, x.seed): x.cfg for x in table.cells}  # and no config is refused
    assert cfgs[table.rows[4], 4000, 3].DISTILL.CWD.LOSS_WEIGHT == 100
    assert [x for x in cfgs if x[2] > 3] == [("alone", 4000, 4), ("alone", 4000, 5)]


def test_short_runs_come_first(
    cells: ModuleType, write: Callable[..., str], tmp_path: Path
) -> None:
    rows = [row(tmp_path), row(tmp_path, "other", OPTS=["SOLVER.BASE_LR", 0.5])]
    table = cells.read_table(write(ROWS=rows, ITERATIONS=[8, 4], SEEDS=[1]))
    found = [(x.iterations, x.row) for x in table.cells]
    assert found == [(4, "alone"), (4, "other"), (8, "alone"), (8, "other")]


def test_some_rows_and_budgets_are_the_same_runs_as_in_the_whole_table(
    cells: ModuleType, write: Callable[..., str], tmp_path: Path
) -> None:
    grid = {"SOLVER.BASE_LR": [0.5, 1.0]}
    rows = [row(tmp_path), row(tmp_path, "other", GRID=grid)]
    table = cells.read_table(write(ROWS=rows, ITERATIONS=[8, 4], SEEDS=[1]))
    assert cells.narrowed(table, [], []) == table
    some = cells.narrowed(table, ["other"], [8])
    assert [(x.row, x.iterations) for x in some.cells] == [
        ("other, BASE_LR 0.5", 8),
        ("other, BASE_LR 1.0", 8),
    ]
    assert set(some.cells) <= set(table.cells) and some.baseline == table.baseline
    assert [x.row for x in cells.narrowed(table, ["other, BASE_LR 1.0"], [4]).cells] == [
        "other, BASE_LR 1.0"
    ]
    with pytest.raises(ValueError, match="--rows: 'othr' is no row of .*Did you mean 'other'"):
        cells.narrowed(table, ["othr"], [])
    with pytest.raises(ValueError, match=r"--iterations: .* has \[4, 8\] iterations, not 5"):
        cells.narrowed(table, [], [5])


def keys_of(cells: ModuleType, path: str) -> List[str]:
    return [x.key for x in cells.read_table(path).cells]


def test_key_is_that_of_all_that_a_run_depends_on(
    cells: ModuleType, write: Callable[..., str], tmp_path: Path
) -> None:
    first = keys_of(cells, write())
    assert keys_of(cells, write(OPTS=["OUTPUT_DIR", "elsewhere"])) == first
    assert keys_of(cells, write(ROWS=[row(tmp_path, "renamed")])) == first
    # A student alone has no teacher, whatever the table says for its other rows.
    teacher = ["DISTILL.TEACHER.WEIGHTS", __file__, "DISTILL.INHERIT", "['neck']"]
    assert keys_of(cells, write(OPTS=teacher)) == first
    others = [{"OPTS": ["SOLVER.BASE_LR", 0.5]}, {"ITERATIONS": [8]}, {"SEEDS": [3, 4]}]
    keys = first + sum([keys_of(cells, write(**x)) for x in others], [])
    assert len(set(keys)) == 8
    text = (tmp_path / "student.yaml").read_text()
    (tmp_path / "student.yaml").write_text(text.replace("WARMUP_ITERS: 2", "WARMUP_ITERS: 1"))
    assert not set(keys_of(cells, write())) & set(keys)


def test_recipe_is_the_same_for_all_seeds(cells: ModuleType, write: Callable[..., str]) -> None:
    one, two = cells.read_table(write()).cells
    assert one.recipe == two.recipe and one.key != two.key
    assert cells.read_table(write(ITERATIONS=[8])).cells[0].recipe != one.recipe


def test_run_with_another_teacher_is_another(cells: ModuleType, tmp_path: Path) -> None:
    opts = write_teacher(tmp_path, "retinanet")
    (tmp_path / "distilled.yaml").write_text(run_config(tmp_path, opts, ["PKD"]).dump())
    said = "PKD", str(tmp_path / "distilled.yaml"), (), 1, 4
    before = cells.Cell(*said)
    assert before.key == cells.Cell(*said).key
    with open(before.cfg.DISTILL.TEACHER.WEIGHTS, "ab") as file:
        file.write(b"0")
    assert cells.Cell(*said).key != before.key


PLUGIN = """
from torch import nn
from d2kd import DISTILL_HEAD_REGISTRY

@DISTILL_HEAD_REGISTRY.register()
class BenchedHead(nn.Module):
    def __init__(self, *, levels, scale: float = {scale}):
        super().__init__()
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "my_head.py"
    path.write_text(PLUGIN.format(scale=1.0))
    yield path
    DISTILL_HEAD_REGISTRY._obj_map.pop("BenchedHead", None)


def test_row_with_a_head_of_ones_own_is_another_run_when_its_file_is_edited(
    cells: ModuleType, write: Callable[..., str], plugin: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text(f"""
        _BASE_: "{tmp_path}/student.yaml"
        DISTILL: {{HEADS: ["Benched"], Benched: {{SCALE: 2.0}}}}
        MODEL: {{META_ARCHITECTURE: "Distiller"}}
        """)
    mine = {"NAME": "mine", "CONFIG": str(tmp_path / "mine.yaml"), "PLUGIN": str(plugin)}
    alone, cell = cells.read_table(write(ROWS=[row(tmp_path), mine], SEEDS=[1])).cells
    assert cell.source[-2:] == ["--plugin", str(plugin)] and "--plugin" not in alone.source
    assert cell.cfg.DISTILL.Benched.SCALE == 2.0
    keys = alone.key, alone.recipe, cell.key, cell.recipe
    with pytest.raises(FileNotFoundError, match=r"ROWS\[0\]: --plugin: there is no file .*gone"):
        cells.read_table(write(ROWS=[{**mine, "PLUGIN": "gone.py"}]))
    plugin.write_text(PLUGIN.format(scale=1.5))
    alone, cell = cells.read_table(write(ROWS=[row(tmp_path), mine], SEEDS=[1])).cells
    now = alone.key, alone.recipe, cell.key, cell.recipe
    assert [a == b for a, b in zip(keys, now)] == [True, True, False, False]


def test_keys_that_are_off_and_heads_not_in_use_make_no_other_run(
    cells: ModuleType, tmp_path: Path
) -> None:
    opts = write_teacher(tmp_path, "retinanet")
    (tmp_path / "distilled.yaml").write_text(run_config(tmp_path, opts, ["PKD"]).dump())

    def key(*words: str) -> str:
        return cells.Cell("PKD", str(tmp_path / "distilled.yaml"), words, 1, 4).key

    first = key()
    assert key("DISTILL.CWD.LOSS_WEIGHT", "7.0") == first
    assert key("DISTILL.PKD.LOSS_WEIGHT", "7.0") != first
    assert key("DISTILL.LIVENESS.ENABLED", "False") != first  # is on by default
    cfg = cells.Cell("PKD", str(tmp_path / "distilled.yaml"), (), 1, 4).cfg
    cfg.DISTILL.A_LATER_KEY = False
    assert cells._digest(cfg) == first
    cfg.DISTILL.A_LATER_KEY = True
    assert cells._digest(cfg) != first


@pytest.mark.parametrize("key", ["STAGES", "TEACHERS"])
def test_strides_count_where_one_of_several_teachers_is_a_backbone(
    key: str, cells: ModuleType, tmp_path: Path
) -> None:
    opts = write_teacher(tmp_path, "retinanet")
    (tmp_path / "distilled.yaml").write_text(run_config(tmp_path, opts, ["PKD"]).dump())

    def recipe(entry: Dict[str, Any], strides: List[int]) -> str:
        words = [f"DISTILL.{key}", repr([{}, entry])]
        words += ["DISTILL.TEACHER.BACKBONE_STRIDES", repr(strides)]
        return cells.Cell("x", str(tmp_path / "distilled.yaml"), tuple(words), 1, 4).recipe

    backbone = {"TEACHER": {"BACKBONE": "test_vit"}}
    assert recipe(backbone, [8]) != recipe(backbone, [32])
    assert recipe({"HEADS": ["MGD"]}, [8]) == recipe({"HEADS": ["MGD"]}, [32])


def test_output_of_another_config_is_in_another_folder(
    cells: ModuleType, write: Callable[..., str]
) -> None:
    tables = [cells.read_table(write(**x)) for x in ({}, {"OPTS": ["SOLVER.BASE_LR", 0.5]})]
    folders = {table.folder(cell) for table in tables for cell in table.cells}
    assert len(folders) == 4 and all("alone_4_seed_" in x for x in folders)


@pytest.mark.parametrize(
    "said, message",
    [
        ({"SEED": [1]}, r"table.yaml has the key SEED .did you mean SEEDS\?"),
        ({"ROWS": []}, "ROWS must be rows of different NAMEs"),
        ({"ROWS": [{"NAME": "x", "CONFIG": "y", "GRID": {"SEED": 1}}]}, "GRID must be {KEY"),
        ({"ROWS": ["alone"]}, r"ROWS\[0\] must be keys with values, got 'alone'"),
        ({"ROWS": [{"NAME": "a", "CONFIGS": "b"}]}, r"ROWS\[0\] has the key CONFIGS"),
        ({"ROWS": [{"NAME": "a"}]}, r"ROWS\[0\]: CONFIG must be a text, got None"),
        ({"ITERATIONS": 4}, "ITERATIONS must be a list of different whole numbers from 1 on, .* 4"),
        ({"SEEDS": [1, 1]}, r"SEEDS must be a list of different .*\[1, 1\]"),
        ({"SEEDS": [True]}, "SEEDS must be a list of different"),
        ({"SEEDS": {4: [1]}}, r"SEEDS must be a list of different .* got \{4: \[1\]\}"),
        (
            {"ROWS": [{"NAME": "a", "CONFIG": "b", "SEEDS": {9: [1]}}]},
            r"ROWS\[0\]: SEEDS has 9 iterations, which are not in ITERATIONS, \[4\]",
        ),
        (
            {"ROWS": [{"NAME": "a", "CONFIG": "b", "SEEDS": {4: 1}}]},
            r"ROWS\[0\]: SEEDS must be a list of different .* got 1",
        ),
        ({"OPTS": ["SEED"]}, "OPTS must be KEY, VALUE"),
        ({"BASELINE": "lone"}, "BASELINE 'lone' is no row; there are alone"),
        ({"TEST": "d2kd_shapes_tset"}, "TEST is .*Did you mean d2kd_shapes_test"),
        ({"OPTS": ["DATASETS.TEST", "()"]}, r"alone, 4 .*DATASETS.TEST must be one set, got \(\)"),
        ({"OPTS": ["SOLVER.OPTIMIZER", "Adam"]}, "alone, 4 iterations, seed 1 .*SOLVER.OPTIMIZER"),
    ],
)
def test_mistake_is_named_before_anything_is_run(
    said: Dict[str, Any], message: str, cells: ModuleType, write: Callable[..., str]
) -> None:
    with pytest.raises(ValueError, match=message):
        cells.check_table(cells.read_table(write(**said)))


def test_same_run_twice_is_refused(
    cells: ModuleType, write: Callable[..., str], tmp_path: Path
) -> None:
    rows = [row(tmp_path), row(tmp_path, "again")]
    with pytest.raises(ValueError, match="again, 4 iterations, seed 1: the same run as alone"):
        cells.check_table(cells.read_table(write(ROWS=rows)))
    with pytest.raises(ValueError, match="rows of different NAMEs, got"):
        cells.read_table(write(ROWS=[row(tmp_path)] * 2))


def test_table_that_is_not_there_is_named(cells: ModuleType) -> None:
    with pytest.raises(FileNotFoundError, match="no table 'gone.yaml'"):
        cells.read_table("gone.yaml")
