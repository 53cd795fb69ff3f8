"""support/runs.py: a run folder that was killed, edited, filled up or made by somebody else."""

import dataclasses
import itertools
import json
import os
import signal
from pathlib import Path
from typing import Callable, Sequence

import pytest
import torch
from conftest import Capture, copy_folder, edit_tensors
from safetensors.torch import save_file
from tiny_run import (DATA, contents, ended, error_of, figures, file_size_limit, forked, pair,
                      rows_of, run_train, timeless, verdict, wait_for)

from bootstrap import Pair, Verdict
from queries import Candidate, Query
from support.hub import InputError
from support.runs import (FILES, SOURCES, STAGES, WITHIN, RunFolder, load_training_state,
                          split_chunks, training_state)


# --------------------------------------------------------------------------------------------------
# Rows, metrics and chunks


NASTY = ["plain", "line\nfeed\r\nand return", 'quotes " and \\ backslash', "tab\tnull\x00bell\x07",
         "emoji 🙂 and 日本語", "next line \x85 here", "line separator \u2028 here",
         "paragraph separator \u2029 here", "vertical \x0b form \x0c file \x1c group \x1d"]


def test_rows_survive_whatever_a_model_writes(run: RunFolder) -> None:
    """A character that a model wrote would break a row."""
    assert run.read("queries.jsonl", Query) == [] and run.metrics() == []
    rows = [Query("p", i, text) for i, text in enumerate(NASTY)]
    run.write("queries.jsonl", rows)
    assert (run.path / "queries.jsonl").read_bytes().count(b"\n") == len(NASTY)
    assert run.read("queries.jsonl", Query) == rows


@pytest.mark.parametrize(("good", "broken"), [
    (Query("p", 0, "q"), '{"persona": "p", "ind'), (Query("p", 0, "q"), "[1, 2]"),
    (Query("p", 0, "q"), '{"persona": "p"}'), (Query("p", 0, "q"), "\udcff"),
    (Query("p", 0, "q"), "[" * 99_999), (Query("p", 0, "q"), {"extra": 1}),
    (Query("p", 0, "q"), {"query": 5}), (verdict(0, "tie"), {"target": 2}),
    (pair(0), {"base_ids": ["5"]}), (pair(0), {"expert_ids": 5})], ids=lambda v: str(v)[:24])
def test_broken_line_is_named(run: RunFolder, good: object, broken: str | dict) -> None:
    """A row that somebody broke by editing would be believed, or not be named by file and line."""
    name, kind, fields = "rows.jsonl", type(good), dataclasses.asdict(good)
    line = json.dumps(fields)
    broken = broken if isinstance(broken, str) else json.dumps(fields | broken)
    (run.path / name).write_bytes(f"{line}\n\n{broken}\n".encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=rf"{name}, line 3: not a {kind.__name__} row"):
        run.read(name, kind)
    (run.path / name).write_text(f"{line}\n\n{line}")  # an editor's blank line, no last line end
    assert run.read(name, kind) == [good, good]


def squares(run: RunFolder, todo: Sequence[Sequence[int]]) -> int:
    """A stage whose rows depend on the whole chunk; returns how many chunks it did."""
    done = 0
    for chunk in run.todo("answers", "answers.jsonl", Query, todo):
        run.commit([Query("p", i, f"{i * i} of {chunk}") for i in chunk], {"prompts": len(chunk)})
        done += 1
    return done


@pytest.mark.parametrize(("kept", "missing"), [(0, 3), (3, 3), (4, 2), (5, 2), (8, 1), (11, 0)])
def test_a_stage_file_cut_anywhere_is_completed(run: RunFolder, kept: int, missing: int) -> None:
    """It would not be completed by whole chunks to the same bytes, and the metrics with it."""
    todo = split_chunks(range(11), 4)
    assert squares(run, todo) == 3
    path = run.path / "answers.jsonl"
    final, metrics = path.read_bytes(), figures(run.path)
    assert metrics == [{"stage": "answers", "step": i, "prompts": n}
                       for i, n in enumerate((4, 4, 3))]
    assert [q.index for q in run.rows("answers.jsonl", Query)] == list(range(11))
    path.write_bytes(b"".join(final.splitlines(keepends=True)[:kept]))
    assert squares(run, todo) == missing
    assert path.read_bytes() == final and figures(run.path) == metrics


# --------------------------------------------------------------------------------------------------
# Beginning in a folder that is there


SETTINGS = {"queries": 5, "max_new_tokens": 12, "judge": "letter", "gate_layer": None, "lr": 0.1}


def begin(folder: Path, overwrite: bool = False, redo: str | None = None,
          **changes: object) -> None:
    """What train.py does before the stages."""
    with RunFolder(folder) as run:
        run.begin(SETTINGS | changes, overwrite, redo)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """The folder of a complete run, its files holding one word each."""
    folder = tmp_path / "made"
    begin(folder)
    with RunFolder(folder) as run:
        for stage in STAGES:
            for name in FILES[stage]:
                (folder / name).write_text("x")
            run.note_source(stage)
        for stage in (*STAGES, *WITHIN):
            run.record(stage, 0)
    return folder


def assert_left(folder: Path, n: int) -> None:
    """Files and metrics of the first `n` stages are there, and nothing of the others."""
    files = {name for stage in STAGES[:n] for name in FILES[stage]}
    assert {p.name for p in folder.iterdir()} == {".lock", "run.json", "metrics.jsonl", *files}
    assert {m["stage"] for m in rows_of(folder, "metrics.jsonl")} == {
        s for s in (*STAGES, *WITHIN) if WITHIN.get(s, s) in STAGES[:n]}


@pytest.mark.parametrize(("setting", "value", "stage"), [
    ("queries", 9, 0), ("max_new_tokens", 9, 1), ("judge", "auto", 2), ("gate_layer", 1, 3),
    ("lr", 0.2, 4), ("query_rules", "of a later edition", 0)])
def test_a_changed_setting_drops_its_stage_and_those_after(made: Path, setting: str, value: object,
                                                           stage: int) -> None:
    """Results would be dropped without --overwrite or --from that stage, or be mixed with it."""
    before = contents(made)
    for later in [None, *STAGES[stage + 1:]]:
        with pytest.raises(InputError, match=rf"{setting} = .*, now it is {value}.*--overwrite"):
            begin(made, redo=later, **{setting: value})
    assert contents(made) == before
    copy = copy_folder(made, made.parent / "copy")
    begin(copy, redo=STAGES[stage], **{setting: value})
    begin(made, overwrite=True, **{setting: value})
    for folder in (copy, made):
        assert_left(folder, stage)
        assert json.loads((folder / "run.json").read_text())["settings"][setting] == value


@pytest.mark.parametrize(("stage", "name"), SOURCES.items())
def test_an_edited_file_makes_later_stages_stale(made: Path, stage: str, name: str) -> None:
    """An edit would go unnoticed or be lost, or what was made from the old file be kept."""
    (made / name).write_text("edited")
    with pytest.raises(InputError, match=f"{name} was edited after {stage} had been made from it"):
        begin(made)
    copy = copy_folder(made, made.parent / "copy")
    begin(made, overwrite=True)
    begin(copy, redo=stage)
    begin(made)  # and now it is told no more
    for folder in (copy, made):
        assert_left(folder, STAGES.index(stage))
        assert (folder / name).read_text() == "edited"


def test_overwrite_where_nothing_differs(made: Path) -> None:
    """--overwrite would drop what an unfinished run has, or keep what a complete one has."""
    (made / "report.md").unlink()
    before = contents(made)
    begin(made, overwrite=True)
    assert contents(made) == before
    (made / "report.md").touch()
    begin(made, overwrite=True)
    assert_left(made, 0)


@pytest.mark.parametrize("stage", STAGES)
def test_from_a_stage_redoes_it_once(made: Path, stage: str) -> None:
    """--from would drop other stages than its own and later ones, or again what it has redone."""
    begin(made, redo=stage)
    assert_left(made, STAGES.index(stage))
    new = made / FILES[stage][0]
    new.touch()
    begin(made, redo=stage)
    begin(made)
    assert new.exists()
    (made / "report.md").touch()
    begin(made, redo=stage)
    assert_left(made, STAGES.index(stage))


@pytest.mark.parametrize(("name", "text"), [
    ("verdicts.jsonl", "{}\n"), ("adapter_model.safetensors", "x"), ("run.json", "not JSON"),
    ("run.json", '{"settings": 3}'), ("metrics.jsonl", "x\n")])
def test_out_of_an_unknown_run_is_refused(command: list[str], tmp_path: Path, name: str, text: str,
                                          capfd: Capture) -> None:
    """Files of some other program would be written over: status 2, one line."""
    (tmp_path / name).write_text(text)
    for more in ([], ["--from", "queries"]):
        assert run_train(*command, "--out", tmp_path, *more) == 2
        assert name in error_of(capfd) and contents(tmp_path) == {name: text.encode()}


# --------------------------------------------------------------------------------------------------
# Killed, interrupted, out of space


def die_at_write(number: int, how: str) -> None:
    """Let this process kill itself (SIGKILL) at that write: in the "middle" of the temporary file,
    "before" it gets its name, or just "after" that."""
    writes, replace = itertools.count(1), os.replace

    def replace_or_die(source: Path, target: Path) -> None:
        last = next(writes) == number
        if last and how == "middle":
            os.truncate(source, source.stat().st_size // 2)
        if not last or how == "after":
            replace(source, target)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace_or_die


def test_killed_again_and_again(finished: Path, command: list[str], tmp_path: Path) -> None:
    """A run killed in every stage and continued would end in other files than one left alone."""
    out, died, status = tmp_path / "out", [], -signal.SIGKILL

    def work() -> int:
        # After few writes at first, where the stages are short.
        die_at_write(2 + len(died), ("middle", "before", "after")[len(died) % 3])
        return run_train(*command, "--out", out)

    while status == -signal.SIGKILL:
        status = ended(forked(Path(os.devnull), work))
        rows = rows_of(out, "metrics.jsonl") if (out / "metrics.jsonl").exists() else []
        died.append(rows[-1]["stage"] if rows else "nothing")
    assert status == 0
    assert len(died) > 8 and len({"queries", "quality", "answers", "judge", "verdicts", "gate",
                                  "lora", "kl"} & set(died[:-1])) >= 5, died
    assert timeless(out) == timeless(finished)
    assert not list(out.glob(".*.tmp"))


def test_interrupted_is_status_130(command: list[str], tmp_path: Path, capsys: Capture) -> None:
    """Ctrl-C or SIGTERM would be a traceback; or two processes be let into a folder, or none."""
    out, log = tmp_path / "out", tmp_path / "log"
    for how, name in ((signal.SIGINT, "candidates.jsonl"), (signal.SIGTERM, "answers.jsonl")):
        child = forked(log, lambda: run_train(*command, "--out", out))
        wait_for(out / name, log)
        os.kill(child, signal.SIGSTOP)
        second = run_train(*command, "--out", out)
        os.kill(child, how)
        os.kill(child, signal.SIGCONT)  # first of all, or a failed check leaves it stopped
        status, said = ended(child), log.read_text()
        assert second == 2 and "another process" in capsys.readouterr().err
        assert status == 130, said
        assert "interrupted" in said.splitlines()[-1] and "Traceback" not in said
        assert "same command continues" in said


def test_disk_full(finished: Path, command: list[str], tmp_path: Path, capfd: Capture) -> None:
    """A full disk would be a traceback, spoil what was written, or be the end of the run."""
    out, failed = tmp_path / "out", []
    for space in (300, 8_000, 50_000):
        with file_size_limit(space):
            assert run_train(*command, "--out", out) == 2
        error = error_of(capfd)
        assert str(out) in error and "make space" in error
        failed.append(Path(error.removeprefix("error: ").partition(":")[0]).name)
        with RunFolder(out) as run:
            for name, kind in zip(DATA, (Candidate, Query, Pair, Verdict)):
                run.read(name, kind)  # no row is broken
            run.metrics()
    assert failed == ["run.json", "candidates.jsonl", "gate.safetensors"]
    assert run_train(*command, "--out", out) == 0
    assert timeless(out) == timeless(finished)


# --------------------------------------------------------------------------------------------------
# Stage 5's checkpoint


def trained(steps: int) -> tuple[list[torch.nn.Parameter], torch.optim.AdamW]:
    """Two parameters after some steps of AdamW."""
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in ((3, 2), (4,))]
    optimizer = torch.optim.AdamW(parameters)
    for _ in range(steps):
        sum(p.sum() for p in parameters).backward()
        optimizer.step()
    return parameters, optimizer


@pytest.mark.parametrize(("change", "reason"), [
    (lambda t: t.pop("1.mean"), "1.mean is missing"), (lambda t: t["step"].fill_(-4), "step -4"),
    (lambda t: t.update({"1.mean": torch.ones(1)}), r"1.mean is \[1\], expected \[4\]"),
    (lambda t: t["1.square"].fill_(float("nan")), "1.square .* holds NaN")])
def test_damaged_checkpoint_is_named(change: Callable, reason: str, tmp_path: Path) -> None:
    """A checkpoint that is not this run's would not be named, or be trained from by half."""
    path = tmp_path / "checkpoint.safetensors"
    save_file(training_state(*trained(3)), path)
    edit_tensors(path, change)
    parameters, optimizer = trained(0)
    with pytest.raises(InputError, match=rf"checkpoint\.safetensors.*{reason}.*delete it"):
        load_training_state(path, parameters, optimizer)
    assert all(bool((p == 1).all()) for p in parameters)
    assert not any(value.any() for state in optimizer.state.values() for value in state.values())
