"""Several processes (gloo, on this machine's CPU): the data of one process, and its gradients."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Sequence

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from support.distributed import each, main_first, processes, rank, world
from support.hub import InputError, exit_status
from model import load
from prism import PRISM
from tiny import randomize_adapter, tiny_llama
from tokenizer import Tokenizer

PERSONAS = {"chemist": "You are a chemist who explains reactions.",
            "pirate": "You are a pirate. Answer like one."}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
                            "PYTHONPATH": os.pathsep.join(sys.path)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with its tokenizer."""
    return tiny_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def command(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """train.py with settings that give every stage several chunks, an odd number of samples in a
    batch, and no dropout, whose draws depend on the number of processes."""
    personas = tmp_path_factory.mktemp("personas")
    for name, text in PERSONAS.items():
        (personas / f"{name}.txt").write_text(text)
    return [train.__file__, "--model", str(model), "--personas", str(personas), "--queries", "25",
            "--max-new-tokens", "12", "--judge", "likelihood", "--epochs", "2", "--batch-size",
            "5", "--rank", "4", "--dropout", "0", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module")
def alone(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    subprocess.run([sys.executable, *command, "--out", str(out)], check=True, env=ENVIRONMENT,
                   capture_output=True)
    return out


def torchrun(command: Sequence[str]) -> subprocess.CompletedProcess:
    """The command by torchrun, in two processes."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "2", *command], env=ENVIRONMENT,
                          capture_output=True, text=True, timeout=300)


def start_two(command: Sequence[str], log: Path) -> list[subprocess.Popen]:
    """The two processes as torchrun starts them, without it, so that one can be killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for number in (0, 1):
        told = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        with (log / f"{number}.log").open("w") as sink:
            started.append(subprocess.Popen(
                [sys.executable, *command], stdout=sink, stderr=subprocess.STDOUT,
                env=ENVIRONMENT | {k: str(v) for k, v in told.items()}))
    return started


def assert_same_data(out: Path, alone: Path) -> None:
    """Byte for byte what one process writes in stages 1-4; its metrics but for time and memory."""
    for name in ("candidates.jsonl", "queries.jsonl", "answers.jsonl", "verdicts.jsonl",
                 "gate.safetensors"):
        assert (out / name).read_bytes() == (alone / name).read_bytes(), name

    def figures(folder: Path) -> list[dict]:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        return [{k: v for k, v in row.items() if k not in ("seconds", "peak_memory")}
                for row in rows if row["stage"] not in ("lora", "kl")]
    assert figures(out) == figures(alone)


def last_row(out: Path) -> dict:
    """The last row of metrics.jsonl: the held-out KL."""
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])


def test_two_processes_write_what_one_does(command: list[str], alone: Path,
                                           tmp_path: Path) -> None:
    """The whole run by torchrun: equal data, and an adapter that is as good."""
    done = torchrun([*command, "--out", str(tmp_path / "out")])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("saved in") == 1  # the second process is silent
    assert_same_data(tmp_path / "out", alone)
    mine, one = last_row(tmp_path / "out"), last_row(alone)
    assert mine["before"] == pytest.approx(one["before"], rel=1e-6)
    assert mine["after"] == pytest.approx(one["after"], rel=1e-4)
    assert mine["after"] < mine["before"]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["versions"]["processes"] == 2


def test_a_lost_process_ends_the_run_and_one_process_continues_it(
        command: list[str], alone: Path, tmp_path: Path) -> None:
    """kill -9 of the second in stage 2: the first says so, and what it wrote is continued."""
    out = tmp_path / "out"
    first, second = start_two([*command, "--out", str(out)], tmp_path)
    limit = time.monotonic() + 120
    while not (out / "answers.jsonl").exists():
        assert first.poll() is None and time.monotonic() < limit
        time.sleep(0.001)
    second.send_signal(signal.SIGKILL)
    second.wait()
    said = (tmp_path / "0.log")
    assert first.wait(60) == 2, said.read_text()[-2000:]
    assert "error: another process of this run has ended" in said.read_text().splitlines()[-1]
    assert not (out / "report.md").exists()
    subprocess.run([sys.executable, *command, "--out", str(out)], check=True, env=ENVIRONMENT,
                   capture_output=True)
    assert_same_data(out, alone)


@pytest.mark.parametrize("extra", [["--queries", "0"], ["--max-len", "9"]],
                         ids=["at once", "in stage 5"])
def test_an_error_is_told_once(command: list[str], extra: list[str], tmp_path: Path) -> None:
    """What all processes find: status 2 in both, one line."""
    started = start_two([*command, *extra, "--out", str(tmp_path / "out")], tmp_path)
    assert [p.wait(120) for p in started] == [2, 2]
    assert_told_once(tmp_path)


@pytest.mark.parametrize("name", ["fail_in_each", "fail_in_main_first"])
def test_an_error_of_one_process_is_told_once(name: str, tmp_path: Path) -> None:
    """What only one process finds ends both."""
    started = start_two([__file__, name], tmp_path)
    assert [p.wait(120) for p in started] == [2, 2]
    assert_told_once(tmp_path)
    assert (tmp_path / "0.log").read_text() == "error: it does not work\n"


def assert_told_once(log: Path) -> None:
    """The first process says it in one line, the second says nothing."""
    first, second = ((log / f"{rank}.log").read_text() for rank in (0, 1))
    assert first.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in first + second and "error" not in second


def test_gradients_of_two_processes(model: Path, tmp_path: Path) -> None:
    """One optimizer step's fp32 gradient at equal global batch: within 1e-5 of one process's, and
    the same in both, also where the second process has no sample."""
    gradients(str(model), str(tmp_path))
    for process in start_two([__file__, "gradients", str(model), str(tmp_path)], tmp_path):
        assert process.wait(120) == 0, (tmp_path / "1.log").read_text()[-2000:]
    one, first, second = (load_file(tmp_path / name) for name in ("0-of-1", "0-of-2", "1-of-2"))
    assert len(one) > 2 * 2
    for name, expected in one.items():
        assert torch.equal(first[name], second[name])
        assert 0 < float(expected.norm())
        assert float((expected - first[name]).norm()) <= 1e-5 * float(expected.norm())


# --------------------------------------------------------------------------------------------------
# What the processes of these tests run: python test_distributed.py NAME ARGUMENTS


def gradients(model: str, out: str) -> None:
    """Write loss and gradient of a batch of 5 samples and of one sample to a file."""
    with processes(torch.device("cpu")):
        net, tokenizer = load(model, dtype=torch.float32), Tokenizer(Path(model))
        prism = randomize_adapter(PRISM(net, rank=4, dropout=0.0))
        args = train.parser().parse_args([])
        generator = torch.Generator().manual_seed(0)
        samples = []
        for i, n in enumerate((3, 30, 7, 50, 21)):
            ids = tokenizer.render([{"role": "user", "content": f"question {i}"}])
            answer = torch.randint(3, 2000, (n,), generator=generator).tolist()
            teacher = torch.randn(n, net.config.hidden_size, generator=generator)
            samples.append(train.Sample(f"x/{i}", [*ids, *answer], len(ids), teacher))
        found = {}
        for batch in (samples, samples[:1]):
            prism.adapter.zero_grad()
            loss = train.batch_gradient(prism, batch, 0, args)
            found |= {f"{len(batch)}.loss": torch.tensor(loss)}
            found |= {f"{len(batch)}.{n}": p.grad.clone()
                      for n, p in prism.adapter.named_parameters()}
        save_file(found, f"{out}/{rank()}-of-{world()}")


def fail_in_each() -> None:
    """The second process fails at its part of the work."""
    def work() -> int:
        if rank() == 1:
            raise InputError("it does not work")
        return rank()

    with processes(torch.device("cpu")):
        assert each(rank) == [0, 1]
        each(work)


def fail_in_main_first() -> None:
    """The first process fails at what the second waits for."""
    with processes(torch.device("cpu")), main_first():
        assert rank() == 0
        raise InputError("it does not work")


if __name__ == "__main__":
    sys.exit(exit_status(lambda: globals()[sys.argv[1]](*sys.argv[2:])))
