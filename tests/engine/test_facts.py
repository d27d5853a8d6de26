"""What a run writes down about itself."""

from pathlib import Path

from d2kd.engine.facts import FILE, hold_facts, read_facts, release_facts, write_fact


def test_facts_are_those_of_the_latest_run_and_of_what_it_resumed(tmp_path: Path) -> None:
    folder = str(tmp_path / "run")
    assert read_facts(folder) == []
    for line, resume in (("first", False), ("second", False), ("third", True)):
        write_fact(folder, "command", line=line, resume=resume)
    assert [x["line"] for x in read_facts(folder)] == ["second", "third"]


def test_line_that_a_killed_process_left_is_skipped(tmp_path: Path) -> None:
    write_fact(str(tmp_path), "environment", PyTorch="2.0")
    with open(tmp_path / FILE, "a") as file:
        file.write('{"kind": "grad')
    assert [x["kind"] for x in read_facts(str(tmp_path))] == ["environment"]


def test_fact_after_half_a_line_is_read(tmp_path: Path) -> None:
    write_fact(str(tmp_path), "command", line="old", resume=False)
    with open(tmp_path / FILE, "a") as file:
        file.write('{"kind": "grad')
    write_fact(str(tmp_path), "command", line="new", resume=False)
    assert [x["line"] for x in read_facts(str(tmp_path))] == ["new"]


def test_facts_of_a_run_count_once_it_begins(tmp_path: Path) -> None:
    folder = str(tmp_path)
    write_fact(folder, "command", line="old", resume=False)
    hold_facts(folder)
    write_fact(folder, "command", line="refused", resume=False)
    hold_facts(folder)  # and again
    write_fact(folder, "command", line="new", resume=False)
    assert [x["line"] for x in read_facts(folder)] == ["old"]
    release_facts(folder)
    write_fact(folder, "environment", PyTorch="2.0")
    assert [x["kind"] for x in read_facts(folder)] == ["command", "environment"]
    assert read_facts(folder)[0]["line"] == "new"
