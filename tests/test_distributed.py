"""Several processes (gloo, on this machine's CPU): the data of one process, and its gradients."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Callable, Sequence

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import one_thread, randomize_adapter
from tiny_run import DATA, ended, figures, forked, run_train, wait_for

import train
from model import load
from prism import PRISM
from support import distributed
from support.distributed import exchange, main_first, processes, rank, world_size
from support.hub import InputError, exit_status


@pytest.fixture(scope="module")
def command(command: list[str]) -> list[str]:
    """Arguments that give every stage several chunks, an odd number of samples in a batch, and no
    dropout, whose draws depend on the number of processes."""
    return [*command, "--epochs", "2", "--batch-size", "5", "--dropout", "0"]


@pytest.fixture(scope="module")
def alone(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    with one_thread():
        assert train.main([*command, "--out", str(out)]) == 0
    return out


def start_two(work: Callable[[], int], log: Path) -> list[int]:
    """Two processes with what torchrun tells them; they are forks of this one, so that nothing has
    to be imported, and the second waits for the first to speak for less than five seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def told(number: int) -> int:
        os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                       "TORCHELASTIC_RUN_ID": "test"}
        distributed.HEAD_START = train.HEAD_START = 0.2
        with one_thread():
            return work()

    return [forked(log / f"{number}.log", lambda n=number: told(n)) for number in (0, 1)]


def assert_same(names: Sequence[str], out: Path, alone: Path) -> None:
    """These files are byte for byte what one process writes."""
    for name in names:
        assert (out / name).read_bytes() == (alone / name).read_bytes(), name


def test_two_processes_write_what_one_does(command: list[str], alone: Path, tmp_path: Path) -> None:
    """Two processes, started by torchrun as a user does it, would write other data, another bill, a
    worse adapter, or both speak."""
    out, environment = tmp_path / "out", os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "2", train.__file__, *command, "--out", str(out)],
                          env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("saved in") == 1
    assert_same((*DATA, "gate.safetensors"), out, alone)
    mine, one = figures(out), figures(alone)
    assert [row for row in mine if row["stage"] not in ("lora", "kl")] == [
        row for row in one if row["stage"] not in ("lora", "kl")]
    assert mine[-1]["before"] == pytest.approx(one[-1]["before"], rel=1e-6)
    assert mine[-1]["after"] == pytest.approx(one[-1]["after"], rel=1e-4)
    assert mine[-1]["after"] < mine[-1]["before"]
    assert '"processes": 2' in (out / "run.json").read_text()


def test_a_lost_process_ends_the_run_and_one_process_continues_it(
        command: list[str], alone: Path, tmp_path: Path) -> None:
    """After kill -9 of the second in stage 2 the first would wait for ever, or its rows be lost."""
    out, log = tmp_path / "out", tmp_path / "0.log"
    argv = [*command, "--out", out, "--stop-after", "answers"]
    first, second = start_two(lambda: run_train(*argv), tmp_path)
    wait_for(out / "queries.jsonl", log)
    os.kill(second, signal.SIGKILL)
    assert (ended(second), ended(first)) == (-9, 2), log.read_text()[-2000:]
    assert "error: another process of this run has ended" in log.read_text().splitlines()[-1]
    assert run_train(*argv) == 0
    assert_same(DATA[:3], out, alone)


def second_fails() -> int:
    """The second process fails at its part of the work."""
    with processes(torch.device("cpu")):
        assert exchange(rank()) == [0, 1]
        assert exchange({"é": [rank()] * (1 + 999 * rank())})[1] == {"é": [1] * 1000}
        if rank() == 1:
            raise InputError("it does not work")
        exchange(rank())
    return 0


def first_fails() -> int:
    """The first process fails at what the second waits for."""
    with processes(torch.device("cpu")), main_first():
        assert rank() == 0
        raise InputError("it does not work")
    return 0


@pytest.mark.parametrize(("work", "said"), [
    (lambda: run_train("--queries", 0), "--queries is 0"),
    (lambda: exit_status(first_fails), "it does not work"),
    (lambda: exit_status(second_fails), "it does not work")], ids=["both", "first", "second"])
def test_an_error_is_told_once(work: Callable[[], int], said: str, tmp_path: Path) -> None:
    """What both or one find wrong would be told twice or not at all, or a process go on."""
    assert list(map(ended, start_two(work, tmp_path))) == [2, 2]
    first, second = ((tmp_path / f"{number}.log").read_text() for number in (0, 1))
    assert "Traceback" not in first + second and "error" not in second
    assert first.count("error: ") == 1 and first.splitlines()[-1].startswith(f"error: {said}")


def gradients(model: Path, out: Path) -> int:
    """Write loss and gradient of a batch of 5 samples and of one sample to a file."""
    with processes(torch.device("cpu")), one_thread():
        net = load(model, dtype=torch.float32)
        prism = randomize_adapter(PRISM(net, rank=4, dropout=0.0))
        args = train.parser().parse_args([])
        generator = torch.Generator().manual_seed(0)
        samples = []
        for n in (3, 30, 7, 50, 21):
            ids = torch.randint(3, 2000, (20 + n,), generator=generator).tolist()
            teacher = torch.randn(n, net.config.hidden_size, generator=generator)
            samples.append(train.Sample(f"x/{n}", ids, 20, teacher))
        found = {}
        for batch in (samples, samples[:1]):
            prism.adapter.zero_grad()
            loss = train.batch_gradient(prism, batch, 0, args)
            found |= {f"{len(batch)}.loss": torch.tensor(loss)}
            found |= {f"{len(batch)}.{n}": p.grad.clone()
                      for n, p in prism.adapter.named_parameters()}
        save_file(found, out / f"{rank()}-of-{world_size()}")
    return 0


def test_gradients_of_two_processes(folder: Path, tmp_path: Path) -> None:
    """At equal global batch a step's fp32 gradient would not be within 1e-5 of one process's, or
    not be the same in both, also where the second process has no sample."""
    gradients(folder, tmp_path)
    started = start_two(lambda: gradients(folder, tmp_path), tmp_path)
    assert list(map(ended, started)) == [0, 0], (tmp_path / "1.log").read_text()[-2000:]
    one, first, second = (load_file(tmp_path / name) for name in ("0-of-1", "0-of-2", "1-of-2"))
    for name, expected in one.items():
        assert torch.equal(first[name], second[name])
        assert 0 < float(expected.norm())
        assert float((expected - first[name]).norm()) <= 1e-5 * float(expected.norm())
