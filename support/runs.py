"""The run folder: stage files that grow by whole chunks, metrics, settings, and what each cost.

A stage is a loop that can be seen:

    for chunk in run.todo("answers", "answers.jsonl", Pair, chunks):
        rows, cost = ...
        run.commit(rows, cost)
    return run.rows("answers.jsonl", Pair)

A chunk is committed in two atomic replacements: first metrics.jsonl gains its row, then the stage
file gains its rows. A kill between the two leaves a metrics row without rows, which is replaced
when the chunk is done again. So a run that was killed anywhere continues to the same files.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import platform
import resource
import sys
import time
from collections import Counter
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Iterable, Iterator, Sequence, get_args, get_origin, get_type_hints

import torch
from torch import nn
from tqdm import tqdm

from support.adapter import read_tensors, write_tensors
from support.distributed import exchange, main_first, rank, world
from support.fields import read_fields
from support.hub import InputError, optional_json, write_file

STAGES = ("queries", "answers", "verdicts", "gate", "lora")
# Traffic is stage 4's, but like queries it depends on the model alone, or on who brought it.
FILES = {"queries": ("candidates.jsonl", "queries.jsonl", "traffic.jsonl"),
         "answers": ("answers.jsonl",), "verdicts": ("verdicts.jsonl",),
         "gate": ("gate.safetensors",),
         "lora": ("checkpoint.safetensors", "adapter_model.safetensors", "adapter_config.json",
                  "prism.json", "README.md", "report.md")}
BROUGHT = ("queries.jsonl", "traffic.jsonl")  # somebody's own may be there before the run
# The file that a stage is made from, which a person may edit between two commands.
SOURCES = {"answers": "queries.jsonl", "verdicts": "answers.jsonl", "gate": "verdicts.jsonl"}
# Metrics rows that are recorded within a stage
WITHIN = {"personas": "queries", "style": "queries", "quality": "queries", "judge": "verdicts",
          "traffic": "gate", "kl": "lora"}
CHUNK = 32  # rows of stages 2 and 3 that are done, and committed, together


class RunFolder:
    """A run's output folder, locked for one process until the `with` block ends. Of several
    processes only the first writes.

    Args:
        read_only: a finished run that somebody else may be reading, too.
    """

    def __init__(self, path: Path, read_only: bool = False):
        self.path, self.writes, self._lock = path, not read_only and rank() == 0, None
        self._done: list | None = None  # what `commit` was given for the chunk in hand
        self._begun = 0.0
        if not self.writes:
            return
        path.mkdir(parents=True, exist_ok=True)
        self._lock = (path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another process is working in this folder") from None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.close()

    # -- stage files -------------------------------------------------------------------------------

    def read(self, name: str, kind: type) -> list:
        """The rows of a stage file as dataclasses of `kind`; an absent file has none."""
        path, rows, types = self.path / name, [], get_type_hints(kind)
        # Not splitlines(): a model may write U+2028, which JSON leaves as it is.
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for number, text in enumerate(lines, 1):
            if not text.strip():
                continue
            try:
                rows.append(kind(**json.loads(text)))
                check_types(rows[-1], types)
            except (ValueError, TypeError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not a {kind.__name__} row ({error}); "
                                 "mend it, or use --overwrite to start again") from None
        return rows

    def rows(self, name: str, kind: type) -> list:
        """`read`, in every process, after the first has written."""
        with main_first():
            return self.read(name, kind)

    def write(self, name: str, rows: Iterable) -> None:
        """Replace a stage file."""
        if self.writes:
            lines = (json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)
            write_file(self.path / name, "".join(lines))

    def todo(self, stage: str, name: str, kind: type,
             chunks: Sequence[Sequence]) -> Iterator[Sequence]:
        """The chunks that are not in the stage file yet; the loop's body has to `commit` each.

        A stage file holds one row for each element of its chunks, in order. Several processes do as
        many chunks at once; each gets its own here.
        """
        rows = self.rows(name, kind)
        self.note_source(stage)
        ends = list(itertools.accumulate(map(len, chunks), initial=0))
        missing = [i for i in range(len(chunks)) if ends[i + 1] > len(rows)]
        if missing:
            del rows[ends[missing[0]]:]
        with tqdm(total=ends[-1], initial=min(len(rows), ends[-1]), desc=stage, unit="row",
                  dynamic_ncols=True, disable=not self.writes) as bar:
            for wave in split_chunks(missing, world()):
                self._done, self._begun = None, time.perf_counter()
                if rank() < len(wave):
                    yield chunks[wave[rank()]]
                for number, done in zip(wave, exchange(self._done)):
                    new, values = done
                    rows += [kind(**row) for row in new]
                    self.record(stage, number, **values)
                    self.write(name, rows)
                    bar.update(len(new))

    def commit(self, rows: Sequence, cost: dict) -> None:
        """Hand in the rows of the chunk that `todo` gave, and what they cost (see `cost_of`)."""
        seconds = round(time.perf_counter() - self._begun, 3)
        values = {**cost, "seconds": seconds, "peak_memory": peak_memory()}
        self._done = [[asdict(row) for row in rows], values]

    # -- metrics -----------------------------------------------------------------------------------

    def metrics(self) -> list[dict]:
        """All rows of metrics.jsonl."""
        path, rows = self.path / "metrics.jsonl", []
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(json.loads(line))
                if not (isinstance(rows[-1]["stage"], str) and isinstance(rows[-1]["step"], int)):
                    raise ValueError("stage or step has the wrong type")
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not a metrics row ({error}); restore it, "
                                 "or choose another --out") from None
        return rows

    def latest(self) -> dict[str, dict]:
        """The last metrics row of each kind, by its `stage`."""
        return {row["stage"]: row for row in self.metrics()}

    def record(self, stage: str, step: int, **values: object) -> None:
        """Add a metrics row, replacing what an interrupted attempt at this step (or later) left."""
        if not self.writes:
            return
        kept = [m for m in self.metrics() if m["stage"] != stage or m["step"] < step]
        self._write_metrics([*kept, {"stage": stage, "step": step, **values}])

    def _write_metrics(self, rows: Sequence[dict]) -> None:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_file(self.path / "metrics.jsonl", "".join(lines))

    # -- settings ----------------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """Whether the run has ended: report.md is the last file that it writes."""
        return (self.path / "report.md").exists()

    def begin(self, settings: dict, first_stage: dict[str, str], overwrite: bool = False,
              redo: str | None = None) -> None:
        """Compare the settings with those of an earlier run in this folder, drop what they make
        invalid, and record them.

        Args:
            first_stage: setting -> the first stage whose result depends on it; if it is not there,
                all do.
            overwrite: drop results; all of a complete run, if nothing differs.
            redo: do this stage and those after it again (--from).

        Raises:
            InputError: settings or edited files that make results invalid, and no leave to drop
                them; files of an unknown run.
        """
        about = self._about()
        old = about.get("settings")
        known = [n for names in FILES.values() for n in names if (self.path / n).exists()
                 and n not in BROUGHT]
        if old is None and known and not overwrite:
            raise InputError(f"{self.path}: holds {known[0]} but no run.json; choose another "
                             "--out, or --overwrite")
        self.metrics()  # a damaged one is named before anything is written
        stale = self._stale(settings, first_stage, about)
        first = STAGES.index(redo) if redo is not None else len(STAGES)
        forbidden = [text for stage, text in stale if stage < first]
        if forbidden and not overwrite:
            raise InputError(f"{self.path}: {forbidden[0]}; choose another --out, or --overwrite")
        if redo is not None and about.get("redo") == redo and not self.complete and not stale:
            first = len(STAGES)  # an interrupted --from, which goes on
        first = min([first, *(stage for stage, _ in stale)])
        unknown = old is None and bool(known)
        again = overwrite and not stale and redo is None and self.complete
        if unknown or again:
            first = 0
        if first < len(STAGES):
            self._forget(STAGES[first:])
            about["redo"] = redo
        about["made_from"] = {stage: found for stage, found in about.get("made_from", {}).items()
                              if STAGES.index(stage) < first}
        if first == 0 or "date" not in about:
            about["date"] = datetime.now().isoformat(timespec="seconds")
        about["settings"] = settings
        about["versions"] = {"python": platform.python_version(), "torch": torch.__version__,
                             "processes": world(), "threads": torch.get_num_threads()}
        self._write_about(about)

    def end(self) -> None:
        """Note that the stages have been gone through, so that the next --from does its work."""
        about = self._about()
        if self.writes and about.pop("redo", None):
            self._write_about(about)

    def _stale(self, settings: dict, first_stage: dict[str, str],
               about: dict) -> list[tuple[int, str]]:
        """(number of the first stage that is no longer valid, why) for every changed setting and
        every file that was edited after it had been used."""
        found, old = [], about.get("settings")
        if old is not None:
            for name in settings:
                if old.get(name) != settings[name]:
                    stage = first_stage.get(name, "queries")
                    found.append((STAGES.index(stage), f"an earlier run has {name} = "
                                  f"{old.get(name)}, now it is {settings[name]}"))
        for stage, digest in about.get("made_from", {}).items():
            if self._digest(SOURCES[stage]) != digest:
                found.append((STAGES.index(stage),
                              f"{SOURCES[stage]} was edited after {stage} had been made from it"))
        return sorted(found)

    def note_source(self, stage: str) -> None:
        """Remember which version of its source a stage is made from."""
        about = self._about()
        made_from = about.setdefault("made_from", {})
        if self.writes and stage in SOURCES and stage not in made_from:
            made_from[stage] = self._digest(SOURCES[stage])
            self._write_about(about)

    def _digest(self, name: str) -> str | None:
        path = self.path / name
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None

    def _about(self) -> dict:
        """run.json: settings, versions, what each stage was made from."""
        path = self.path / "run.json"
        about = optional_json(path)
        if path.exists() and not (isinstance(about.get("settings", {}), dict)
                                  and isinstance(about.get("made_from", {}), dict)
                                  and set(about.get("made_from", {})) <= set(SOURCES)):
            raise InputError(f"{path}: not a run's settings; choose another --out")
        return about

    def _write_about(self, about: dict) -> None:
        if self.writes:
            write_file(self.path / "run.json", json.dumps(about, indent=1) + "\n")

    def _forget(self, stages: Sequence[str]) -> None:
        """Delete the files and the metrics of these stages."""
        if not self.writes:
            return
        for name in (name for stage in stages for name in FILES[stage]):
            (self.path / name).unlink(missing_ok=True)
        self._write_metrics([m for m in self.metrics()
                             if WITHIN.get(m["stage"], m["stage"]) not in stages])


def run_date(folder: Path | None) -> datetime | None:
    """When the run in a folder began, which a template that writes a date is given for all of its
    prompts, whatever day it is; None if there is no run."""
    if folder is None:
        return None
    path = folder / "run.json"
    text = read_fields(path).text("date", None)
    try:
        return datetime.fromisoformat(text) if text else None
    except ValueError:
        raise InputError(f"{path}: date = {text[:40]!r} is no date") from None


def check_types(row: object, types: dict[str, type]) -> None:
    """TypeError if a field of a row, which a person may have edited, is of another type."""
    for name, expected in types.items():
        value, inner = getattr(row, name), get_args(expected)
        if get_origin(expected) is list:
            fits = isinstance(value, list) and all(isinstance(v, inner) for v in value)
        else:
            fits = isinstance(value, expected)
        if not fits:
            raise TypeError(f"{name} is {str(value)[:40]}")


def split_chunks(rows: Sequence, size: int = CHUNK) -> list[Sequence]:
    """Fixed chunks in file order; the last may be shorter."""
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def cost_of(net: nn.Module, prompts: int, read: int, written: int = 0, scored: int = 0) -> dict:
    """What a piece of work cost, for metrics.jsonl.

    Args:
        net: the Transformer that did it.
        read, written: tokens that went through the layers as input, and that were generated.
        scored: input tokens whose probability was read, so that the head ran on them as well.
    """
    return {"prompts": prompts, "tokens_read": read, "tokens_written": written,
            "flops": net.flops(read + written, written + scored)}


def add_costs(costs: Iterable[dict]) -> dict:
    """The sum of several costs."""
    summed: Counter = Counter()
    for one in costs:
        summed.update(one)
    return dict(summed)


def peak_memory() -> int:
    """The most bytes this process has held so far: on the GPU if it uses one, else in memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere else


def save_training_state(folder: Path, parameters: Sequence[nn.Parameter],
                        optimizer: torch.optim.AdamW, step: int) -> None:
    """Parameters, both AdamW moments and the step. There is no random state to keep: every draw is
    seeded by the step it belongs to."""
    tensors = {"step": torch.tensor(float(step))}
    for i, p in enumerate(parameters):
        state = optimizer.state[p]
        tensors |= {f"{i}.value": p, f"{i}.mean": state["exp_avg"],
                    f"{i}.square": state["exp_avg_sq"]}
    write_tensors(folder / "checkpoint.safetensors", tensors)


def load_training_state(folder: Path, parameters: Sequence[nn.Parameter],
                        optimizer: torch.optim.AdamW) -> int:
    """Restore what `save_training_state` wrote and return its step; 0 if there is none."""
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return 0
    expected = {"step": torch.tensor(0.0)}
    for i, p in enumerate(parameters):
        expected |= {f"{i}.value": p, f"{i}.mean": p, f"{i}.square": p}
    try:
        tensors = read_tensors(path, expected)
        if tensors["step"] < 1:
            raise InputError(f"{path}: step {float(tensors['step']):g}")
    except InputError as error:
        raise InputError(f"{error}; delete it and stage 5 starts again") from None
    with torch.no_grad():
        for i, p in enumerate(parameters):
            p.copy_(tensors[f"{i}.value"])
            optimizer.state[p] = {"step": tensors["step"].clone(),
                                  "exp_avg": tensors[f"{i}.mean"].to(p.device),
                                  "exp_avg_sq": tensors[f"{i}.square"].to(p.device)}
    return int(tensors["step"])
