"""Runs the cells of a table, side by side; each finished one never again."""

import fcntl
import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import IO, Dict, Iterator, List, Optional, Sequence

from bench_cells import Cell, Table
from bench_losses import keep_losses
from bench_progress import Clock
from bench_results import append_result, read_results
from bench_samples import keep_samples
from bench_steps import Children, StepFailed, run_cell


class Bench:
    """
    Fills a table: each cell has an OUTPUT_DIR of its own, a lock in it while somebody runs it, and
    a row in the CSV when it is finished.
    """

    def __init__(self, table: Table, jobs: int, every: float = 60.0):
        """
        Args:
            jobs: runs at a time
            every: seconds between two lines of progress
        """
        self.table, self.jobs, self.every = table, jobs, every
        self.failed: List[Cell] = []
        self._children = Children()

    def finished(self) -> List[Cell]:
        """Cells that have a row in the CSV, with a figure for the table's test set."""
        rows = read_results(self.table.results)
        done = {x["key"] for x in rows if x["test_AP"] or not self.table.test}
        return [cell for cell in self.table.cells if cell.key in done]

    def run(self) -> None:
        """Run what is not finished; a cell that fails does not stop the others."""
        done = self.finished()
        todo = [cell for cell in self.table.cells if cell not in done]
        print(f"{len(self.table.cells)} cells, {len(done)} finished, {len(todo)} to run")
        clock = Clock({self.table.folder(cell): cell.iterations for cell in todo})
        with ThreadPoolExecutor(self.jobs) as pool:
            try:
                # What another bench has in hand, or a run that outlived one, comes last.
                elsewhere = self._all(pool, todo, clock, patient=False)
                self._all(pool, elsewhere, clock, patient=True)
            except BaseException:
                self._children.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _all(
        self, pool: ThreadPoolExecutor, cells: Sequence[Cell], clock: Clock, patient: bool
    ) -> List[Cell]:
        """Returns: those that are in other hands; none where it is patient"""
        jobs: Dict[Future, Cell] = {pool.submit(self._cell, x, patient): x for x in cells}
        pending, elsewhere = set(jobs), []
        while pending:
            ended, pending = wait(pending, self.every, FIRST_COMPLETED)
            elsewhere += [jobs[job] for job in ended if not job.result()]
            if ended:
                self._keep_for_comparisons()
            count = f"{len(self.finished())}/{len(self.table.cells)}"
            print(f"[{count} cells] {clock}", flush=True)
        return elsewhere

    def _cell(self, cell: Cell, patient: bool) -> bool:
        """Returns: whether it has been in our hands"""
        with self._locked(cell, patient) as lock:
            if lock is None:
                return False
            if not self._children.stopped.is_set() and cell not in self.finished():
                self._run(cell, lock)
        return True

    def _run(self, cell: Cell, lock: IO) -> None:
        print(f"begins: {cell}, in {self.table.folder(cell)}", flush=True)
        try:
            row = run_cell(self.table, cell, lock, self._children)
        except StepFailed as error:
            if not self._children.stopped.is_set():
                self.failed.append(cell)
                print(f"FAILED: {cell}\n{error}", flush=True)
            return
        append_result(self.table.results, row)
        scores = [f"{k[:-3]} AP {row[k]}" for k in ("val_AP", "test_AP") if k in row]
        print(f"finished: {cell}: {', '.join(scores)}", flush=True)

    def _keep_for_comparisons(self) -> None:
        """Of a table with a baseline: bench_verdict.py and bench_losses.py then need no runs."""
        if self.table.baseline:
            rows = [x for x in self.table.rows if x not in self.table.grids]
            keep_losses(self.table, rows)
            try:
                keep_samples(self.table, rows)
            except ValueError as error:
                print(f"No verdicts on these runs: {error}", flush=True)

    @contextmanager
    def _locked(self, cell: Cell, patient: bool) -> Iterator[Optional[IO]]:
        folder = self.table.folder(cell)
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, "lock"), "w") as lock:
            while not self._children.stopped.is_set():
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if not patient:
                        yield None
                        return
                    time.sleep(0.5)
            yield lock
