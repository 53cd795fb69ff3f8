"""support/runs.py: a run folder that was killed, edited, filled up or made by somebody else."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Callable, Iterator, Sequence

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_hub import file_size_limit
from tiny_run import DATA, contents, error_of, pair, rows_of, run_train, timeless, verdict
from tqdm import tqdm

from bootstrap import Pair, Verdict
from queries import Candidate, Query
from support.hub import InputError
from support.runs import (FILES, SOURCES, STAGES, RunFolder, load_training_state,
                          save_training_state, split_chunks)
from support.settings import FIRST_STAGE

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    """An open run folder."""
    folder = RunFolder(tmp_path / "run")
    yield folder
    folder.close()


# --------------------------------------------------------------------------------------------------
# Rows and metrics


NASTY = ["plain", "line\nfeed\r\nand return", 'quotes " and \\ backslash', "tab\tnull\x00bell\x07",
         "emoji 🙂 and 日本語", "next line \x85 here", "line separator \u2028 here",
         "paragraph separator \u2029 here", "vertical \x0b form \x0c file \x1c group \x1d"]


def test_rows_survive_whatever_a_model_writes(run: RunFolder) -> None:
    """A character that a model wrote would break a row, or somebody could change one behind the
    file's back."""
    assert run.read("queries.jsonl", Query) == [] and run.metrics() == []
    rows = [Query("p", i, text) for i, text in enumerate(NASTY)]
    run.write("queries.jsonl", rows)
    data = (run.path / "queries.jsonl").read_bytes()
    assert data.count(b"\n") == len(NASTY) and data.endswith(b"\n")
    assert run.read("queries.jsonl", Query) == rows
    for row in (rows[0], pair(0), verdict(0, "tie")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            row.index = 3


@pytest.mark.parametrize(("name", "kind", "good", "wrong"), [
    ("queries.jsonl", Query, Query("p", 0, "q"), [
        '{"persona": "p", "ind', '{"persona": "p"}', "[1, 2]", "7", "\udcff",
        '{"persona": "p", "index": 1, "query": "q", "extra": 1}',
        '{"persona": "p", "index": 1, "query": 5}', '{"persona": "p", "index": "1", "query": "q"}',
        '{"persona": null, "index": 1, "query": "q"}', "[" * 99_999]),
    ("answers.jsonl", Pair, pair(0), [
        json.dumps(dataclasses.asdict(pair(1)) | {"base_ids": ["5"]}),
        json.dumps(dataclasses.asdict(pair(1)) | {"expert_ids": 5})]),
    ("verdicts.jsonl", Verdict, verdict(0, "tie"), [
        json.dumps(dataclasses.asdict(verdict(1, "tie")) | {"target": "1"}),
        json.dumps(dataclasses.asdict(verdict(1, "tie")) | {"target": 0.5}),
        json.dumps(dataclasses.asdict(verdict(1, "tie")) | {"target": 2})])])
def test_broken_line_is_named(run: RunFolder, name: str, kind: type, good: object,
                              wrong: list[str]) -> None:
    """A row that is no row of its kind, or has a field of another type, would be believed or not be
    named by file and line: people edit these files."""
    line = json.dumps(dataclasses.asdict(good))
    for broken in wrong:
        (run.path / name).write_bytes(
            f"{line}\n\n{broken}\n{line}\n".encode("utf-8", "surrogateescape"))
        with pytest.raises(InputError, match=rf"{name}, line 3: not a {kind.__name__} row"):
            run.read(name, kind)
    for row in ('{"stage": "answers", "st', "[]", '{"loss": 1}', '{"stage": 1, "step": 0}'):
        (run.path / "metrics.jsonl").write_text(f"{row}\n")
        with pytest.raises(InputError, match=r"metrics\.jsonl, line 1"):
            run.record("answers", 0)
    (run.path / name).write_text(f"{line}\n\n{line}")  # an editor's blank line, no last line end
    assert run.read(name, kind) == [good, good]


# --------------------------------------------------------------------------------------------------
# Chunks


def squares(run: RunFolder, todo: Sequence[Sequence[int]]) -> list[int]:
    """A stage whose rows depend on the whole chunk; returns the chunks that it did."""
    calls = []
    for chunk in run.todo("answers", "answers.jsonl", Query, todo):
        calls.append(list(todo).index(chunk))
        run.commit([Query("p", i, f"{i * i} of {list(chunk)}") for i in chunk],
                   {"prompts": len(chunk)})
    return calls


def figures(run: RunFolder) -> list[dict]:
    """Metrics rows without times and memory."""
    return [{k: v for k, v in m.items() if k not in ("seconds", "peak_memory")}
            for m in run.metrics()]


@pytest.mark.parametrize("kept", [0, 1, 3, 4, 5, 7, 8, 9, 11])
def test_a_stage_file_cut_anywhere_is_completed(run: RunFolder, kept: int) -> None:
    """It would not be completed to the same bytes, by whole chunks only, the metrics with it."""
    todo = split_chunks(range(11), 4)
    assert squares(run, todo) == [0, 1, 2]
    path = run.path / "answers.jsonl"
    final, metrics = path.read_bytes(), figures(run)
    assert metrics == [{"stage": "answers", "step": i, "prompts": n}
                       for i, n in enumerate((4, 4, 3))]
    assert [q.index for q in run.rows("answers.jsonl", Query)] == list(range(11))
    path.write_bytes(b"".join(final.splitlines(keepends=True)[:kept]))
    assert squares(run, todo) == [n for n, done in enumerate((4, 8, 11)) if done > kept]
    assert path.read_bytes() == final and figures(run) == metrics


# --------------------------------------------------------------------------------------------------
# Beginning in a folder that is there


SETTINGS = {"queries": 5, "seed": 0, "max_new_tokens": 12, "query_rules": "a", "judge": "letter",
            "verdict_rules": "b", "gate_layer": None, "gate_rules": "c", "lr": 0.1, "rank": 4}
WITHIN_STAGE = {"personas": 0, "queries": 0, "style": 0, "quality": 0, "answers": 1,
                "judge": 2, "verdicts": 2, "gate": 3, "lora": 4, "kl": 4}


def begin(folder: Path, overwrite: bool = False, redo: str | None = None,
          **changes: object) -> None:
    """What train.py does before the stages."""
    run = RunFolder(folder)
    try:
        run.begin(SETTINGS | changes, FIRST_STAGE, overwrite, redo)
    finally:
        run.close()


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """The folder of a complete run, its files holding one word each."""
    folder = tmp_path / "made"
    begin(folder)
    run = RunFolder(folder)
    for name in (n for names in FILES.values() for n in names if n != "checkpoint.safetensors"):
        (folder / name).write_text("x")
    for stage in STAGES:
        run.note_source(stage)
    for stage in WITHIN_STAGE:
        run.record(stage, 0)
    run.close()
    return folder


def left(folder: Path) -> int:
    """How many leading stages are there; checks that files and metrics agree, and that nothing is
    left of the others."""
    there = [all((folder / n).exists() for n in FILES[s] if n != "checkpoint.safetensors")
             for s in STAGES]
    some = [any((folder / n).exists() for n in FILES[s]) for s in STAGES]
    stages = {WITHIN_STAGE[m["stage"]] for m in rows_of(folder, "metrics.jsonl")}
    n = sum(there)
    assert there == some == [i < n for i in range(len(STAGES))] and stages == set(range(n))
    return n


@pytest.mark.parametrize(("setting", "value", "stage"), [
    ("queries", 9, 0), ("seed", 1, 0), ("query_rules", "z", 0), ("max_new_tokens", 9, 1),
    ("judge", "auto", 2), ("verdict_rules", "z", 2), ("gate_layer", 1, 3), ("gate_rules", "z", 3),
    ("lr", 0.2, 4)])
def test_a_changed_setting_drops_its_stage_and_those_after(made: Path, setting: str, value: object,
                                                           stage: int) -> None:
    """Results would be dropped unasked, or rows of two settings mixed: without leave the setting is
    named and nothing is touched; --from a later stage is no leave, --from that stage is."""
    before = contents(made)
    for later in [None, *STAGES[stage + 1:]]:
        with pytest.raises(InputError, match=rf"{setting} = .*, now it is {value}.*--overwrite"):
            begin(made, redo=later, **{setting: value})
    assert contents(made) == before
    copy = Path(shutil.copytree(made, made.parent / "copy"))
    begin(copy, redo=STAGES[stage], **{setting: value})
    begin(made, overwrite=True, **{setting: value})
    assert left(made) == left(copy) == stage
    assert json.loads((made / "run.json").read_text())["settings"][setting] == value


@pytest.mark.parametrize(("stage", "name"), SOURCES.items())
def test_an_edited_file_makes_later_stages_stale(made: Path, stage: str, name: str) -> None:
    """An edit would go unnoticed or be lost: the file is named, and the stage that was made from
    it; with --overwrite, or --from it, that stage and those after it are dropped, and the edited
    file is kept. Saving it unchanged is no edit."""
    (made / name).write_text("x")
    (made / "report.md").rename(made / "kept")  # an incomplete run
    before = contents(made)
    begin(made, overwrite=True)  # which is continued, as nothing differs
    assert contents(made) == before
    (made / "kept").rename(made / "report.md")
    (made / name).write_text("edited")
    with pytest.raises(InputError, match=f"{name} was edited after {stage} had been made from it"):
        begin(made)
    copy = Path(shutil.copytree(made, made.parent / "copy"))
    begin(made, overwrite=True)
    begin(copy, redo=stage)
    assert left(made) == left(copy) == STAGES.index(stage)
    assert (made / name).read_text() == (copy / name).read_text() == "edited"
    begin(made)  # and now it is told no more
    (made / "report.md").write_text("x")
    begin(made, overwrite=True)  # a complete run, and nothing differs
    assert left(made) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_from_a_stage_redoes_it_once(made: Path, stage: str) -> None:
    """--from on a complete run would drop other stages than that one and those after it; or the
    same command again, after a kill, would drop more. On a run that is complete again, it does."""
    begin(made, redo=stage)
    assert left(made) == STAGES.index(stage)
    for name in FILES[stage]:
        (made / name).write_text("new")
    before = contents(made)
    (made / "report.md").unlink(missing_ok=True)
    before.pop("report.md", None)
    begin(made, redo=stage)
    begin(made)
    assert contents(made) == before
    (made / "report.md").write_text("done")
    begin(made, redo=stage)
    assert not any((made / name).exists() for name in FILES[stage])


@pytest.mark.parametrize(("name", "text"), [
    ("verdicts.jsonl", "{}\n"), ("adapter_model.safetensors", "x"), ("run.json", "[1]"),
    ("run.json", "not JSON"), ("run.json", '{"settings": 3}'),
    ("run.json", '{"settings": {}, "made_from": {"judge": "x"}}'), ("metrics.jsonl", "x\n")])
def test_out_of_an_unknown_run_is_refused(command: list[str], tmp_path: Path, name: str, text: str,
                                          capfd: Capture) -> None:
    """Files of some other program would be written over: status 2, one line."""
    (tmp_path / name).write_text(text)
    assert run_train(*command, "--out", tmp_path) == 2
    assert name in error_of(capfd) and contents(tmp_path) == {name: text.encode()}


def test_a_run_of_the_first_edition_is_refused(made: Path) -> None:
    """Its run.json lacks the rules of today's code, so nobody can say whether its rows are those
    that this code would write: they would be mixed. --overwrite starts again."""
    about = json.loads((made / "run.json").read_text())
    del about["settings"]["query_rules"], about["made_from"]
    about["settings"]["votes"] = 1
    (made / "run.json").write_text(json.dumps(about))
    before = contents(made)
    with pytest.raises(InputError, match="an earlier run has query_rules = None"):
        begin(made)
    assert contents(made) == before
    begin(made, overwrite=True)
    assert left(made) == 0 and "votes" not in (made / "run.json").read_text()


# --------------------------------------------------------------------------------------------------
# Killed, interrupted, out of space


def forked(log: Path, work: Callable[[], int]) -> int:
    """Run `work` in a child process whose output goes to `log`, and whose exit status is its
    result; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    tqdm.set_lock(threading.RLock())  # its own lock is shared with forks, which die holding it
    try:
        with log.open("w") as sys.stdout:
            sys.stderr = sys.stdout
            try:
                status = work()
            except SystemExit as end:
                status = end.code
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(status)


def run_and_die(command: Sequence[str], out: Path, after: int, how: str) -> int:
    """The command in a process that kills itself (SIGKILL) at its write number `after`: in the
    "middle" of the temporary file, "before" it gets its name, or just "after" that. Returns what
    os.waitpid says; 0 if the command ended before."""
    def work() -> int:
        writes, fsync, replace = [0], os.fsync, os.replace

        def die_in_fsync(descriptor: int) -> None:
            writes[0] += 1
            if writes[0] == after and how != "after":
                if how == "middle":
                    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            fsync(descriptor)

        def die_after_replace(source: Path, target: Path) -> None:
            replace(source, target)
            if writes[0] == after and how == "after":
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync, os.replace = die_in_fsync, die_after_replace
        return run_train(*command, "--out", out)

    return os.waitpid(forked(Path(os.devnull), work), 0)[1]


def test_killed_again_and_again(finished: Path, command: list[str], tmp_path: Path) -> None:
    """A run killed in every stage, a third of the times in the middle of a write, and continued by
    the same command, would end in other files than the run that nobody disturbed."""
    out, died, status = tmp_path / "out", [], -1
    while status != 0:
        how = ("middle", "before", "after")[len(died) % 3]
        # After few writes at first, where the stages are short.
        status = run_and_die(command, out, 2 + len(died) // 2, how)
        assert status == 0 or os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        rows = rows_of(out, "metrics.jsonl") if (out / "metrics.jsonl").exists() else []
        died.append(rows[-1]["stage"] if rows else "nothing")
        assert len(died) < 100
    assert len(died) > 8 and len({"queries", "quality", "answers", "judge", "verdicts", "gate",
                                  "lora", "kl"} & set(died[:-1])) >= 5, died
    assert timeless(out) == timeless(finished)
    assert not list(out.glob(".*.tmp"))


def lines_in(path: Path) -> int:
    """Rows of a file, 0 if it is not there."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_interrupted_is_status_130(finished: Path, command: list[str], tmp_path: Path,
                                   capsys: Capture) -> None:
    """Ctrl-C in stage 1, or SIGTERM after stage 2's first chunk, would be a traceback or not say
    how to continue; while the process works, a second one would be let into the same folder; or,
    dead, it would still hold the folder."""
    out, log = tmp_path / "out", tmp_path / "log"
    for how, name in ((signal.SIGINT, "candidates.jsonl"), (signal.SIGTERM, "answers.jsonl")):
        child = forked(log, lambda: run_train(*command, "--out", out))
        limit = time.monotonic() + 120
        while not lines_in(out / name):
            assert time.monotonic() < limit, log.read_text()
            time.sleep(0.001)
        os.kill(child, signal.SIGSTOP)
        assert run_train(*command, "--out", out) == 2
        assert "another process" in capsys.readouterr().err
        os.kill(child, how)
        os.kill(child, signal.SIGCONT)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = log.read_text()
        assert status == 130, said
        assert "interrupted" in said.splitlines()[-1] and "Traceback" not in said
        assert "same command continues" in said
    assert run_train(*command, "--out", out) == 0
    assert timeless(out) == timeless(finished)


def test_disk_full(finished: Path, command: list[str], tmp_path: Path, capfd: Capture) -> None:
    """A full disk (files that cannot grow beyond so many bytes) would be a traceback, spoil what
    was written, or be the end of the run: with space it continues to the same files."""
    out, failed = tmp_path / "out", []
    for space in (300, 8_000, 50_000):
        with file_size_limit(space):
            assert run_train(*command, "--out", out) == 2
        error = error_of(capfd)
        assert str(out) in error and "make space" in error
        failed.append(Path(error.removeprefix("error: ").partition(":")[0]).name)
        run = RunFolder(out)
        try:
            for name, kind in zip(DATA, (Candidate, Query, Pair, Verdict)):
                assert len(run.read(name, kind)) == lines_in(out / name)
            run.metrics()
        finally:
            run.close()
    assert failed == ["run.json", "candidates.jsonl", "gate.safetensors"]
    assert run_train(*command, "--out", out) == 0
    assert timeless(out) == timeless(finished)


# --------------------------------------------------------------------------------------------------
# Stage 5's checkpoint


def trained(steps: int, seed: int = 0) -> tuple[list[torch.nn.Parameter], torch.optim.AdamW]:
    """Two parameters after some steps of AdamW."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator))
                  for shape in ((3, 2), (4,))]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for _ in range(steps):
        sum((p**2).sum() for p in parameters).backward()
        optimizer.step()
        optimizer.zero_grad()
    return parameters, optimizer


@pytest.mark.parametrize(("damage", "reason"), [
    ("missing", "1.mean"), ("shape", "another shape"), ("NaN", "not finite"), ("step", "'step'"),
    ("negative step", "step -4"), ("empty", ""), ("cut", ""), ("nested", "")])
def test_damaged_checkpoint_is_named(damage: str, reason: str, tmp_path: Path) -> None:
    """A checkpoint that is not this run's would not be named, or be trained from by half."""
    path = tmp_path / "checkpoint.safetensors"
    save_training_state(tmp_path, *trained(3), 3)
    tensors = load_file(path)
    if damage == "missing":
        tensors.pop("1.mean")
    elif damage == "shape":
        tensors["1.mean"] = tensors["1.mean"][:1].clone()
    elif damage == "NaN":
        tensors["1.square"][0] = float("nan")
    elif damage == "negative step":
        tensors["step"] = torch.tensor(-4)
    elif damage == "step":
        tensors.pop("step")
    save_file(tensors, path)
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": data[:-9],
                      "nested": (99_999).to_bytes(8, "little") + b"[" * 99_999}.get(damage, data))
    parameters, optimizer = trained(0, seed=1)
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(InputError, match=rf"checkpoint\.safetensors.*{reason}.*delete it"):
        load_training_state(tmp_path, parameters, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(parameters, before)) and not optimizer.state
