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
from typing import Callable, Iterable, Iterator, Sequence, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from tqdm import tqdm

from support.adapter import read_tensors
from support.distributed import exchange, main_first, rank, world_size
from support.fields import read_fields
from support.hub import InputError, optional_json, read_json, write_file

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
# The settings that decide a stage's result, and so that of those after it; what is not here, like
# the seed, concerns all of them.
SETTINGS = {"queries": ("model", "queries", "query_style"),
            "answers": ("max_new_tokens", "answer_temperature"),
            "verdicts": ("judge", "judge_model", "judge_fingerprint", "rule_sha256",
                         "verdict_rules"),
            "gate": ("gate_layer", "gate_pool", "gate_target", "gate_threshold", "gate_rate",
                     "gate_rules"),
            "lora": ("rank", "alpha", "epochs", "lr", "batch_size", "max_len", "kd_temperature",
                     "dropout", "loss", "lora_rules", "train_tokens")}
# Metrics rows that are recorded within a stage
WITHIN = {"personas": "queries", "style": "queries", "quality": "queries", "judge": "verdicts",
          "traffic": "gate", "kl": "lora"}
CHUNK = 32  # rows of stages 2 and 3 that are done, and committed, together


class RunFolder:
    """A run's output folder. Within a `with` block it is locked for one process, and written; of
    several processes only the first writes. Outside of one it can be read."""

    def __init__(self, path: Path):
        self.path, self.writes = path, False
        self._done: list | None = None  # what `commit` was given for the chunk in hand
        self._begun = 0.0

    def __enter__(self) -> "RunFolder":
        self.writes = rank() == 0
        if self.writes:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{self.path}: another process is working in this "
                                 "folder") from None
        return self

    def __exit__(self, *error: object) -> None:
        if self.writes:
            self._lock.close()

    # -- stage files -------------------------------------------------------------------------------

    def read(self, name: str, kind: type) -> list:
        """The rows of a stage file as dataclasses of `kind`; an absent file has none."""
        types = get_type_hints(kind)
        return self._parse(name, lambda row: checked(kind(**row), types), kind.__name__,
                           "mend it, or use --overwrite to start again")

    def _parse(self, name: str, make: Callable, what: str, advice: str) -> list:
        """What `make` makes of each line's JSON."""
        path, rows = self.path / name, []
        # Not splitlines(): a model may write U+2028, which JSON leaves as it is.
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        for number, text in enumerate(lines, 1):
            if not text.strip():
                continue
            try:
                rows.append(make(json.loads(text)))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise InputError(f"{path}, line {number}: not a {what} row ({error}); "
                                 f"{advice}") from None
        return rows

    def rows(self, name: str, kind: type) -> list:
        """`read`, in every process, after the first has written."""
        with main_first():
            return self.read(name, kind)

    def write(self, name: str, rows: Iterable) -> None:
        """Replace a stage file."""
        self._write(name, map(asdict, rows))

    def _write(self, name: str, rows: Iterable[dict]) -> None:
        assert self.writes or rank() > 0, "a run is written within `with run:`"
        if self.writes:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
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
        del rows[ends[len(chunks) - len(missing)]:]  # of a chunk that is not whole
        with tqdm(total=ends[-1], initial=len(rows), desc=stage, unit="row", dynamic_ncols=True,
                  disable=not self.writes) as bar:
            for wave in split_chunks(missing, world_size()):
                self._done, self._begun = None, time.perf_counter()
                if rank() < len(wave):
                    yield chunks[wave[rank()]]
                for number, (new, values) in zip(wave, exchange(self._done)):
                    rows += [kind(**row) for row in new]
                    self.record(stage, number, **values)
                    self.write(name, rows)
                    bar.update(len(new))

    def commit(self, rows: Sequence, cost: dict) -> None:
        """Hand in the rows of the chunk that `todo` gave, and what they cost (see `cost_of`)."""
        self._done = [[asdict(row) for row in rows], {**cost, **spent_since(self._begun)}]

    # -- metrics -----------------------------------------------------------------------------------

    def metrics(self) -> list[dict]:
        """All rows of metrics.jsonl."""
        return self._parse("metrics.jsonl", metrics_row, "metrics",
                           "restore it, or choose another --out")

    def latest(self) -> dict[str, dict]:
        """The last metrics row of each kind, by its `stage`."""
        return {row["stage"]: row for row in self.metrics()}

    def record(self, stage: str, step: int, **values: object) -> None:
        """Add a metrics row, replacing what an interrupted attempt at this step (or later) left."""
        kept = [m for m in self.metrics() if m["stage"] != stage or m["step"] < step]
        self._write("metrics.jsonl", [*kept, {"stage": stage, "step": step, **values}])

    # -- settings ----------------------------------------------------------------------------------

    @property
    def settings(self) -> dict:
        """The settings of the run, by `begin`; InputError if there are none."""
        path = self.path / "run.json"
        settings = read_json(path).get("settings")
        if not isinstance(settings, dict) or "seed" not in settings:
            raise InputError(f"{path}: no settings in it, so this is not a run's")
        return settings

    @property
    def complete(self) -> bool:
        """Whether the run has ended: report.md is the last file that it writes."""
        return (self.path / "report.md").exists()

    def begin(self, settings: dict, overwrite: bool = False, redo: str | None = None) -> None:
        """Compare the settings with those of an earlier run in this folder, drop what they make
        invalid, and record them.

        Args:
            overwrite: drop results; all of a complete run, if nothing differs.
            redo: do this stage and those after it again (--from).

        Raises:
            InputError: settings or edited files that make results invalid, and no leave to drop
                them; files of an unknown run.
        """
        about = self._about()
        self.metrics()  # a damaged one is named before anything is written
        stale = self._stale(settings, about)
        first = STAGES.index(redo) if redo is not None else len(STAGES)
        forbidden = [why for stage, why in stale if stage < first]
        if forbidden and not overwrite:
            raise InputError(f"{self.path}: {forbidden[0]}; choose another --out, or --overwrite")
        if not (stale or self.complete) and about.get("redo") == redo:
            first = len(STAGES)  # an interrupted --from goes on
        if overwrite and redo is None and self.complete and not stale:
            first = 0
        first = max(min([first, *(stage for stage, _ in stale)]), 0)
        if first < len(STAGES):
            self._forget(STAGES[first:])
            about["redo"] = redo
        about["made_from"] = {stage: digest for stage, digest in about["made_from"].items()
                              if STAGES.index(stage) < first}
        if first == 0 or "date" not in about:
            about["date"] = datetime.now().isoformat(timespec="seconds")
        about["settings"] = settings
        about["versions"] = {"python": platform.python_version(), "torch": torch.__version__,
                             "processes": world_size(), "threads": torch.get_num_threads()}
        self._write_about(about)

    def end(self) -> None:
        """Note that the stages have been gone through, so that the next --from does its work."""
        about = self._about()
        if about.pop("redo", None):
            self._write_about(about)

    def _stale(self, settings: dict, about: dict) -> list[tuple[int, str]]:
        """(number of the first stage that is no longer valid, why) for every changed setting and
        every file that was edited after it had been used; for files of an unknown run -1, so that
        not even --from may drop them."""
        found, old = [], about.get("settings")
        if old is None:
            known = [name for names in FILES.values() for name in names
                     if name not in BROUGHT and (self.path / name).exists()]
            found += [(-1, f"holds {name} but no run.json") for name in known[:1]]
            old = settings
        stage_of = {name: stage for stage, names in SETTINGS.items() for name in names}
        for name, value in settings.items():
            if old.get(name) != value:
                stage = stage_of.get(name, "queries")
                found.append((STAGES.index(stage), f"an earlier run has {name} = {old.get(name)}, "
                              f"now it is {value}"))
        for stage, digest in about["made_from"].items():
            if self._digest(SOURCES[stage]) != digest:
                found.append((STAGES.index(stage),
                              f"{SOURCES[stage]} was edited after {stage} had been made from it"))
        return sorted(found)

    def note_source(self, stage: str) -> None:
        """Remember which version of its source a stage is made from."""
        about = self._about()
        if stage in SOURCES and stage not in about["made_from"]:
            about["made_from"][stage] = self._digest(SOURCES[stage])
            self._write_about(about)

    def _digest(self, name: str) -> str | None:
        path = self.path / name
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None

    def _about(self) -> dict:
        """run.json: settings, versions, what each stage was made from."""
        path = self.path / "run.json"
        about = optional_json(path)
        made_from = about.setdefault("made_from", {})
        if not (isinstance(about.get("settings", {}), dict) and isinstance(made_from, dict)
                and set(made_from) <= set(SOURCES)):
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
        self._write("metrics.jsonl", [m for m in self.metrics()
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


def checked(row: object, types: dict[str, type]) -> object:
    """A row; TypeError if a field of it, which a person may have edited, is of another type."""
    for name, expected in types.items():
        value, inner = getattr(row, name), get_args(expected)
        if get_origin(expected) is list:
            fits = isinstance(value, list) and all(isinstance(v, inner) for v in value)
        else:
            fits = isinstance(value, expected)
        if not fits:
            raise TypeError(f"{name} is {str(value)[:40]}")
    return row


def metrics_row(row: dict) -> dict:
    """A metrics row; TypeError or KeyError if it is none."""
    if not (isinstance(row["stage"], str) and isinstance(row["step"], int)):
        raise TypeError("stage or step has the wrong type")
    return row


def split_chunks(rows: Sequence, size: int = CHUNK) -> list[Sequence]:
    """Fixed chunks in file order; the last may be shorter."""
    return [rows[i:i + size] for i in range(0, len(rows), size)]


def cost_of(net: nn.Module, prompts: int, read: int, written: int = 0,
            scored: int = 0) -> Counter[str]:
    """What a piece of work of the Transformer `net` cost, for metrics.jsonl: tokens read as input,
    written, and scored (input whose probability was read, so that the head ran on it as well)."""
    return Counter(prompts=prompts, tokens_read=read, tokens_written=written,
                   flops=net.flops(read + written, written + scored))


def peak_memory() -> int:
    """The most bytes this process has held so far: on the GPU if it uses one, else in memory."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere else


def spent_since(begun: float) -> dict[str, float]:
    """The seconds since a `time.perf_counter()`, and the memory held at most, for metrics.jsonl."""
    return {"seconds": round(time.perf_counter() - begun, 3), "peak_memory": peak_memory()}


def training_state(parameters: Sequence[nn.Parameter],
                   optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """What a checkpoint holds, as it lies in memory: parameters, both AdamW moments and the step.
    There is no random state to keep: every draw is seeded by the step it belongs to."""
    tensors = {}
    for i, p in enumerate(parameters):
        state = optimizer.state[p]
        if not state:  # as AdamW begins its first step
            state |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p),
                      "exp_avg_sq": torch.zeros_like(p)}
        tensors |= {"step": state["step"], f"{i}.value": p.data, f"{i}.mean": state["exp_avg"],
                    f"{i}.square": state["exp_avg_sq"]}
    return tensors


def load_training_state(path: Path, parameters: Sequence[nn.Parameter],
                        optimizer: torch.optim.AdamW) -> int:
    """Restore a `training_state` from its file and return its step; 0 if there is none."""
    here = training_state(parameters, optimizer)
    if not path.exists():
        return 0
    try:
        tensors = read_tensors(path, here)
        if tensors["step"] < 1:
            raise InputError(f"{path}: step {float(tensors['step']):g}")
    except InputError as error:
        raise InputError(f"{error}; delete it and stage 5 starts again") from None
    for name, tensor in here.items():
        tensor.copy_(tensors[name])
    for p in parameters:
        optimizer.state[p]["step"].copy_(tensors["step"])
    return int(tensors["step"])
