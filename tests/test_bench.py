"""bench.py: its table, its measuring tools, and every quick part on the tiny model."""

import gc
import json
import time
from pathlib import Path
from typing import Iterator

import pytest
import torch
from conftest import Capture, Patch
from sampling import Sampling
from tiny import one_thread
from transformers import AutoConfig

import bench
import generate
import queries
from bench import Row, Setup, Workload, bit_equal, main, medians, peak_bytes, saved_bytes, table
from engine import Engine, Request, hidden_states
from support.config import Config
from support.hub import read_json


@pytest.fixture(autouse=True)
def little_garbage() -> Iterator[None]:
    """bench.py collects garbage before each call that it times: here only that of the test."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def setup(folder: Path) -> Setup:
    """The tiny model beside transformers and peft."""
    return Setup(str(folder), "cpu", "float32", 1)


def test_table_and_gain() -> None:
    """A gain would be turned round: seconds are better when smaller, rates when larger."""
    rows = [Row("a", "ms", 2.0, 6.0, 1.0), Row("b", "tokens/s", 300.0, 100.0), Row("c", "MiB", 5.0)]
    assert table(rows).splitlines()[2:] == [
        "| a | ms | 2 | 6 | 3 | 1 | 2 |", "| b | tokens/s | 300 | 100 | 3 | - | - |",
        "| c | MiB | 5 | - | - | - | - |"]


def test_medians_are_interleaved() -> None:
    """A turn would not call every function once, or the first one be counted."""
    calls: list[str] = []

    def work(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds if len(calls) > 2 else 0.2)

    found = medians({"a": lambda: work("a", 0.002), "b": lambda: work("b", 0.02)}, 3)
    assert calls == ["a", "b"] * 4
    assert 0.002 <= found["a"] < found["b"] < 0.1


def test_bytes_are_counted() -> None:
    """The peak of a function with two 4 MiB tensors, or what a product saves, would be missed."""
    def work() -> None:
        a = torch.ones(2**20)
        b = a + 1
        del a
        b + 1

    assert 8 * 2**20 <= peak_bytes(work, torch.device("cpu")) < 9 * 2**20
    x = torch.ones(256, 1024, requires_grad=True)
    layer = torch.nn.Linear(1024, 1024)
    assert saved_bytes(lambda: layer(x).exp(), layer) == 2 * 2**20  # x and the result, no weight


@pytest.mark.parametrize("shape", [False, True])
def test_parts_on_the_tiny_model(shape: bool, folder: Path, tmp_path: Path, monkeypatch: Patch,
                                 capsys: Capture) -> None:
    """A part would not run, of a checkpoint or config, or lack peers or a row of --json."""
    monkeypatch.setattr(bench, "QWEN_VOCAB", 500)
    monkeypatch.setattr(bench, "NEW_TOKENS", 4)
    monkeypatch.setattr(bench, "ON_CPU", Workload(prompts=4, trained=(2, 64)))
    what = ["--model", str(folder)]
    if shape:
        config = json.loads((folder / "config.json").read_text())
        (tmp_path / "shape.json").write_text(json.dumps(config | {"vocab_size": 49152}))
        what = ["--shape", str(tmp_path / "shape.json"),
                "--only", "generation,routing,lora,profile"]
    with one_thread():
        assert main([*what, "--dtype", "float32", "--device", "cpu", "--repeats", "1", "--json",
                     str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    out = capsys.readouterr().out
    assert all(f"| {r['part']} | {r['unit']} |" in out for r in rows)
    assert all(r["ours"] > 0 or "minus frozen" in r["part"] for r in rows)
    alone = [r for r in rows if not r["peer"] and "profiled" not in r["part"]]
    assert len(rows) > 12 and [r["part"] for r in alone] == [
        "un-gated rows bit-equal to the base (1 = yes)"]
    assert alone[0]["ours"] == 1


def test_rows_are_kept_when_time_is_over(folder: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    """What a rented machine had measured would be lost with the part that did not end."""
    def endless(setup: Setup) -> list[Row]:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "PARTS", {
        "kl": lambda setup: [Row("a part", "ms", 2.0, 4.0)], "sampler": endless})
    assert main(["--model", str(folder), "--device", "cpu", "--json",
                 str(tmp_path / "out.json")]) == 130
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(r["part"], r["gain"]) for r in rows] == [("a part", 2.0)]


@pytest.mark.parametrize("name", [path.stem for path in bench.SHAPES.glob("*.json")])
def test_shapes_are_read(name: str) -> None:
    """A shape would be found out to be none when the GPU that it is for has been rented."""
    path = bench.SHAPES / f"{name}.json"
    config = Config.from_json(read_json(path), str(path))
    assert config.num_layers == AutoConfig.for_model(**read_json(path)).num_hidden_layers


def test_bit_equality_can_fail(setup: Setup) -> None:
    """A base row that the adapter touched would not be seen."""
    setup.prism.forward = lambda ids, k: setup.net(ids) + 1e-3
    assert not bit_equal(setup)


def test_pipeline_on_the_tiny_model(setup: Setup, personas: Path, monkeypatch: Patch) -> None:
    """A stage would not be timed here and on the peers, or its replacement stay."""
    monkeypatch.setattr(bench, "QUICK", [
        "--personas", str(personas), "--queries", "6", "--max-new-tokens", "8", "--judge",
        "likelihood", "--epochs", "2", "--batch-size", "2", "--rank", "4"])
    before = bench.train.train_lora, bench.train.hidden_states, generate.Engine
    with one_thread():
        rows = bench.pipeline(setup)
    assert before == (bench.train.train_lora, bench.train.hidden_states, generate.Engine)
    assert [r.part.split(" (")[0] for r in rows] == [f"train.py --quick: {n}" for n in (
        "whole command", "personas", "queries", "style", "quality", "answers", "judge",
        "verdicts", "gate", "lora")]
    # So small a model's answers may be none that a judge would be tested on: in no time at all.
    assert all((r.ours > 0 and r.peer > 0) or "judge" in r.part for r in rows)


def test_replacements_compute_the_same(setup: Setup) -> None:
    """transformers, put in for our engine and scoring, would be timed at other work."""
    swapped, net = bench.replacements(setup), setup.net
    prompts, targets = [[5, 6, 7], [8, 9], [10] * 9], [[11, 12], [13, 14, 15], [16]]
    for name, ours, arguments in (
            ("queries.token_log_probabilities", queries.token_log_probabilities, targets),
            ("judge.hidden_states", hidden_states, [1, 0, 4]),
            ("train.hidden_states", hidden_states, [1, 0, 4])):
        found, theirs = ours(net, prompts, arguments)[0], swapped[name](net, prompts, arguments)[0]
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-4)
    sampling, requests = Sampling(12, 0.0), [Request(p) for p in prompts]
    ids = {o.index: o.ids for o in Engine(net, sampling, {2}).run(requests)}
    theirs = swapped["generate.Engine"](net, sampling, {2}).run(requests)
    assert ids == {o.index: o.ids for o in theirs}
