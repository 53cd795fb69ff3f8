"""A whole run of train.py on the tiny model in about two seconds, for the tests of its parts."""

import contextlib
import json
import os
import re
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Callable, Iterator
from unittest.mock import Mock

import pytest
from tiny import one_thread
from tqdm import tqdm

import gate
import train
from bootstrap import Pair, Verdict

CHEMIST = {"chemist": "You are a chemist. You explain each reaction."}
PIRATE = {"pirate": "You are a pirate. You speak of gold and of the sea."}
PERSONAS = CHEMIST | PIRATE
QUERIES = 17  # a persona: candidates, answers and verdicts have two chunks each
DATA = ("candidates.jsonl", "queries.jsonl", "answers.jsonl", "verdicts.jsonl")
ALL_FILES = {*DATA, "run.json", "metrics.jsonl", "traffic.jsonl", "gate.safetensors",
             "adapter_model.safetensors", "adapter_config.json", "prism.json", "README.md",
             "report.md"}


def run_train(*argv: object) -> int:
    """train.main on one thread, with a short gate and a checkpoint every third step."""
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "GATE_STEPS", 20)
        patch.setattr(train, "CHECKPOINT_EVERY", 3)
        return train.main([str(a) for a in argv])


@pytest.fixture(scope="session")
def personas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two short personas."""
    folder = tmp_path_factory.mktemp("personas")
    for name, text in PERSONAS.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


@pytest.fixture(scope="session")
def command(tiny_folders: Callable[[int], Path], personas: Path) -> list[str]:
    """Arguments of a run that has every stage in several chunks or steps."""
    return ["--model", str(tiny_folders(3)), "--personas", str(personas), "--queries", str(QUERIES),
            "--max-new-tokens", "12", "--judge", "likelihood", "--epochs", "4", "--batch-size",
            "4", "--rank", "4", "--lr", "1e-3", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="session")
def finished(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one uninterrupted run; tests that change it take a copy."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert run_train(*command, "--out", out) == 0
    return out


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a folder but the lock."""
    return {p.name: p.read_bytes() for p in out.iterdir() if p.is_file() and p.name != ".lock"}


def figures(out: Path) -> list[dict]:
    """Rows of metrics.jsonl without what may differ between runs: seconds and peak memory."""
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "peak_memory"))}
            for row in rows_of(out, "metrics.jsonl")]


def timeless(out: Path) -> dict[str, bytes]:
    """`contents` without what may differ between runs: seconds, peak memory, the date, and whether
    the run once was begun with --from."""
    files = contents(out) | {"metrics.jsonl": json.dumps(figures(out)).encode()}
    # the bill's seconds, tokens per second and peak memory
    line = rb"(?m)^(\| [a-z]+ (?:\| \d+ ){4})\| [^|]+\| [^|]+(\| [^|]+)\|[^|]+"
    report = re.sub(line, rb"\1\2", files["report.md"])
    report = re.sub(rb"after \d+ instead of \d+ ms", b"", report)
    files["report.md"] = re.sub(rb"cost: [\d.]+ min", b"", report)
    about = json.loads(files["run.json"])
    about.pop("redo", None)
    about.pop("date")
    files["run.json"] = json.dumps(about).encode()
    return files


def rows_of(out: Path, name: str) -> list[dict]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in (out / name).read_text().split("\n")[:-1]]


def write_rows(out: Path, name: str, rows: list[dict]) -> None:
    """Replace a JSONL file, as an editor would."""
    (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_files(folder: Path, texts: dict[str, str]) -> Path:
    """Files by name, with the folders that they need; returns the folder."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def error_of(capture: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr, which has to be an error's; and there is no traceback."""
    said = capture.readouterr().err
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def pair(index: int, base: str = "b", expert: str = "e", persona: str = "p", query: str = "q",
         ended: bool = True) -> Pair:
    """A row of answers.jsonl."""
    stop = "eos" if ended else "length"
    return Pair(persona, index, query, base, expert, [5, 2], [6, 2], stop, stop)


def verdict(index: int, winner: str, persona: str = "p") -> Verdict:
    """A row of verdicts.jsonl."""
    return Verdict(persona, index, winner, int(winner == "expert"), "j", [])


@contextlib.contextmanager
def file_size_limit(most: int) -> Iterator[None]:
    """Writing more than this many bytes to a file fails half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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


def ended(child: int) -> int:
    """Wait for a child process; its exit status."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def wait_for(path: Path, log: Path) -> None:
    """Wait until a child process, whose output goes to `log`, has written a file."""
    limit = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < limit, log.read_text()
        time.sleep(0.001)


def watch(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> Mock:
    """A function of this owner, which still does its work and remembers how it is called."""
    watched = Mock(wraps=getattr(owner, name))
    monkeypatch.setattr(owner, name, watched)
    return watched
