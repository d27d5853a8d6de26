"""The table that tools/bench.py fills: a YAML of rows, seeds and budgets, and the runs in it."""

import hashlib
import itertools
import os
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from d2kd import DISTILL_HEAD_REGISTRY, load_config
from d2kd.config import leaves
from d2kd.config.lessons import prefixed
from d2kd.data.shapes import SPLITS
from d2kd.engine.preflight.check_config import check_config
from d2kd.utils.checks import nearest
from d2kd.utils.plugin import import_file
from d2kd.utils.safe_yaml import read_yaml
from d2kd.utils.sha256 import sha256_of
from d2kd.weights.start import starting_weights

OF_TABLE = ("RESULTS", "OUTPUT_DIR", "TEST", "ROWS", "BASELINE")
OF_ROW = ("NAME", "CONFIG", "GRID", "PLUGIN")
OF_BOTH = ("OPTS", "SEEDS", "ITERATIONS")  # a row's own, or else the table's


@dataclass(frozen=True)
class Cell:
    """One run: a row of the table with a seed and a budget."""

    row: str
    config: str
    opts: Tuple[str, ...]  # KEY, VALUE, ... of the row
    seed: int
    iterations: int
    plugin: str = ""  # the file of its own head, already imported

    @property
    def source(self) -> List[str]:
        """The YAML, and what it needs to be read, as options of train_net.py."""
        plugin = ["--plugin", self.plugin] if self.plugin else []
        return ["--config-file", self.config, *plugin]

    @property
    def words(self) -> List[str]:
        """All overrides of the YAML."""
        return [*self.opts, "SOLVER.MAX_ITER", str(self.iterations), "SEED", str(self.seed)]

    @property
    def cfg(self) -> CfgNode:
        return load_config(self.config, self.words)

    @cached_property
    def key(self) -> str:
        """Tells runs apart that would not give the same figure, wherever their output goes."""
        return _digest(self.cfg, self.plugin)

    @cached_property
    def recipe(self) -> str:
        """As `key`, the same for all seeds."""
        cfg = self.cfg
        cfg.SEED = -1
        return _digest(cfg, self.plugin)

    def __str__(self) -> str:
        return f"{self.row}, {self.iterations} iterations, seed {self.seed}"


class Table(NamedTuple):
    """
    test: data set on which each finished run is evaluated and nothing is chosen; "": none
    grids: of each row that a GRID made, the NAME above the GRID
    """

    name: str
    results: str
    output: str
    test: str
    rows: Tuple[str, ...]
    baseline: str
    grids: Dict[str, str]
    cells: Tuple[Cell, ...]

    def folder(self, cell: Cell) -> str:
        """OUTPUT_DIR of a cell's run; another one when its config is another."""
        name = re.sub(r"\W+", "_", f"{cell.row}_{cell.iterations}_seed_{cell.seed}").strip("_")
        return os.path.join(self.output, f"{name}_{cell.key[:8]}")


def read_table(path: str) -> Table:
    """
    Raises:
        ValueError: naming the file, the row and the key that are wrong
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"There is no table {path!r}.")
    said = read_yaml(path)
    _refuse_unknown(said, (*OF_TABLE, *OF_BOTH), path)
    rows: List[Dict[str, Any]] = []
    cells: List[Cell] = []
    grids: Dict[str, str] = {}
    for i, asked in enumerate(said.get("ROWS") or []):
        where = f"{path}: ROWS[{i}]"
        _refuse_unknown(asked, (*OF_ROW, *OF_BOTH), where)
        for row in _rows_of(asked, where):
            rows.append(row)
            cells += _cells_of(row, said, where)
            if row["NAME"] != asked["NAME"]:
                grids[row["NAME"]] = asked["NAME"]
    names = [row["NAME"] for row in rows]
    twice = [x for x in names if names.count(x) > 1]
    if not rows or twice:
        raise ValueError(f"{path}: ROWS must be rows of different NAMEs, got {twice or 'none'}.")
    baseline = said.get("BASELINE", "")
    if baseline and baseline not in names:
        raise ValueError(f"{path}: BASELINE {baseline!r} is no row; there are {', '.join(names)}.")
    stem = os.path.splitext(path)[0]
    name = os.path.basename(stem)
    return Table(
        name,
        said.get("RESULTS", f"{stem}.csv"),
        said.get("OUTPUT_DIR", f"output/bench/{name}"),
        said.get("TEST", ""),
        tuple(names),
        baseline,
        grids,
        # All rows are early in the CSV.
        tuple(sorted(cells, key=lambda x: (x.iterations, x.seed))),
    )


def narrowed(table: Table, rows: Sequence[str], iterations: Sequence[int]) -> Table:
    """
    A table with some of the cells.

    Args:
        rows: as for `named_rows`
        iterations: budgets; none: all

    Raises:
        ValueError: a name or a number that the table does not have
    """
    wanted = named_rows(table, rows)
    budgets = {x.iterations for x in table.cells}
    for number in iterations:
        if number not in budgets:
            raise ValueError(
                f"--iterations: {table.name} has {sorted(budgets)} iterations, not {number}."
            )
    cells = [
        x for x in table.cells if x.row in wanted and (not iterations or x.iterations in iterations)
    ]
    return table._replace(cells=tuple(cells))


def named_rows(table: Table, names: Sequence[str], option: str = "--rows") -> Tuple[str, ...]:
    """
    Args:
        names: NAMEs, also those above a GRID, which are all of its rows; none: all rows
        option: where they were given, for the error

    Returns:
        the rows, in the order of the table

    Raises:
        ValueError: a name that the table does not have
    """
    known = [*table.rows, *dict.fromkeys(table.grids.values())]
    for name in names:
        if name not in known:
            near = "".join(f" Did you mean {x!r}?" for x in nearest(name, known))
            raise ValueError(
                f"{option}: {name!r} is no row of {table.name}.{near} "
                f"There are {', '.join(table.rows)}."
            )
    return tuple(x for x in table.rows if not names or x in names or table.grids.get(x) in names)


def check_table(table: Table) -> None:
    """
    Before the first run, all that would stop the last one.

    Raises:
        ValueError, FileNotFoundError: naming the row
    """
    keys: Dict[str, Cell] = {}
    for cell in table.cells:
        cfg, key = cell.cfg, cell.key
        if key in keys:
            raise ValueError(f"{cell}: the same run as {keys[key]}.")
        keys[key] = cell
        try:
            check_config(cfg)
        except (ValueError, FileNotFoundError) as error:
            raise type(error)(f"{cell} ({cell.config}): {error}") from error
        if len(cfg.DATASETS.TEST) != 1:
            raise ValueError(f"{cell}: DATASETS.TEST must be one set, got {cfg.DATASETS.TEST}.")
        known = [*SPLITS, *(x["NAME"] for x in cfg.DATASETS.COCO_FORMAT), *DatasetCatalog.list()]
        if table.test and table.test not in known:
            near = "".join(f" Did you mean {x}?" for x in nearest(table.test, known))
            raise ValueError(f"TEST is {table.test!r}, which {cell} does not know.{near}")


def _rows_of(row: Dict[str, Any], where: str) -> Iterator[Dict[str, Any]]:
    """The row, or one for each combination of the values that its GRID lists."""
    for key in ("NAME", "CONFIG", "PLUGIN"):
        wanted = key != "PLUGIN" or key in row
        if wanted and not (isinstance(row.get(key), str) and row[key]):
            raise ValueError(f"{where}: {key} must be a text, got {row.get(key)!r}.")
    grid = row.get("GRID", {})
    if not isinstance(grid, dict) or not all(isinstance(x, list) and x for x in grid.values()):
        raise ValueError(f"{where}: GRID must be {{KEY: [VALUE, ...]}}, got {grid!r}.")
    for values in itertools.product(*grid.values()):
        said = [f"{key.split('.')[-1]} {value}" for key, value in zip(grid, values)]
        opts = [*(row.get("OPTS") or ()), *itertools.chain(*zip(grid, values))]
        yield {**row, "NAME": ", ".join([row["NAME"], *said]), "OPTS": opts}


def _cells_of(row: Dict[str, Any], table: Dict[str, Any], where: str) -> Iterator[Cell]:
    opts = [*(table.get("OPTS") or ()), *(row.get("OPTS") or ())]
    if len(opts) % 2:
        raise ValueError(f"{where}: OPTS must be KEY, VALUE, ..., got {opts}.")
    plugin = row.get("PLUGIN", "")
    if plugin:
        with prefixed(where):
            import_file(plugin)
    words = tuple(map(str, opts))
    budgets = _whole_numbers(row.get("ITERATIONS", table.get("ITERATIONS")), "ITERATIONS", where, 1)
    seeds = row.get("SEEDS", table.get("SEEDS"))
    of_budget: Dict[int, Any] = {}
    if isinstance(row.get("SEEDS"), dict):
        of_budget, seeds = row["SEEDS"], table.get("SEEDS")
    for budget in of_budget:
        if budget not in budgets:
            raise ValueError(
                f"{where}: SEEDS has {budget!r} iterations, which are not in ITERATIONS, {budgets}."
            )
    for iterations in budgets:
        for seed in _whole_numbers(of_budget.get(iterations, seeds), "SEEDS", where, 0):
            yield Cell(row["NAME"], row["CONFIG"], words, seed, iterations, plugin)


def _whole_numbers(values: Any, key: str, where: str, low: int) -> List[int]:
    wrong = not isinstance(values, list) or not values or len(set(values)) < len(values)
    if wrong or any(type(x) is not int or x < low for x in values):
        raise ValueError(
            f"{where}: {key} must be a list of different whole numbers from {low} on, in the row "
            f"or for the whole table, got {values!r}."
        )
    return values


def _refuse_unknown(said: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(said, dict):
        raise ValueError(f"{where} must be keys with values, got {said!r}.")
    for key in said:
        if key not in known:
            hint = "".join(f" (did you mean {x}?)" for x in nearest(key, known))
            raise ValueError(f"{where} has the key {key}{hint}; known are {', '.join(known)}.")


def _digest(cfg: CfgNode, plugin: str = "") -> str:
    """
    Of a config, of the weights that it starts from, and of the file of its own head. Left out is
    what changes nothing: its OUTPUT_DIR, keys that are off, sections not in use, DISTILL for a
    student alone. So a later d2kd, with more keys and more heads, knows a run again.
    """
    stages = [x for x in (*cfg.DISTILL.STAGES, *cfg.DISTILL.TEACHERS) if isinstance(x, dict)]
    used = {*cfg.DISTILL.HEADS, *itertools.chain(*(x.get("HEADS") or () for x in stages))}
    # A stage's, or one of several teachers', takes the run's strides.
    backbones = [(x.get("TEACHER") or {}).get("BACKBONE") for x in (cfg.DISTILL, *stages)]
    heads = {name[: -len("Head")] for name, _ in DISTILL_HEAD_REGISTRY}
    is_distilled = cfg.MODEL.META_ARCHITECTURE == "Distiller"
    sections = {
        "DISTILL.": is_distilled,
        **{f"DISTILL.{head}.": head in used for head in heads},
        "DISTILL.UNLABELLED.": bool(cfg.DISTILL.UNLABELLED.SETS),
        "DISTILL.TEACHER.BACKBONE_STRIDES": any(backbones),
        "MODEL.TIMM.": "timm" in cfg.MODEL.BACKBONE.NAME,
    }
    idle = tuple(section for section, is_used in sections.items() if not is_used)
    said = [
        f"{key}: {value!r}"
        for key, value in leaves(cfg)
        if key != "OUTPUT_DIR" and value and not key.startswith(idle)
    ]
    digest = hashlib.sha256("\n".join(sorted(said)).encode())
    for path in (*starting_weights(cfg), *([plugin] if plugin else [])):
        digest.update(bytes.fromhex(sha256_of(path)))
    return digest.hexdigest()[:16]
