"""support/estimate.py: --dry-run's plan against figures by hand and what is kept, and what a run
says beforehand of its cost against bills of real runs."""

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Capture, Patch, Tiny
from tiny import one_thread, randomize_adapter
from torch.utils.flop_counter import FlopCounterMode

import train
from bench import SHAPES, saved_bytes
from engine import PrefixReader
from model import Sizes, Transformer, load
from prism import PRISM
from queries import Query
from support import estimate
from support.config import FAMILIES, Config, kept_tokens
from support.estimate import announce, expected_flops
from support.hub import read_json
from support.runs import RunFolder

QWEN_7B = SHAPES / "qwen2.5-7b.json"
QUICK = {"personas": ["coding", "math", "safety_monitor", "writing"], "queries": 10,
         "max_new_tokens": 64, "judge": "auto", "epochs": 4}


def test_memory_plan_of_a_7b_model(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """From a config.json alone: weights and cache by hand, all within 24 GB, not 16; no file."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--dry-run", "--model", str(QWEN_7B)]
    assert train.main(arguments) == 0
    out = capsys.readouterr().out
    layer = 3584 * (3584 + 2 * 512) + 3584 + 2 * 512 + 3584**2 + 3 * 3584 * 18944 + 2 * 3584
    weights = 2 * (28 * layer + 2 * 152064 * 3584 + 3584)
    cache = 32 * (512 + 512) * 28 * 2 * 4 * 128 * 2
    assert f"| 1-2 answers | {weights / 2**30:.2f} | {cache / 2**30:.2f} |" in out
    assert "| 24 GB | yes |" in out and "| 80 GB | yes |" in out
    assert train.main([*arguments, "--gpu-memory", "16"]) == 0
    assert "| 16 GB | no |" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("gigabytes", "flags", "expected"), [
    (None, [], Sizes(recompute=True)), (16, [], Sizes(recompute=True)),
    (24, [], Sizes(32, 16384, 2**23, 8192, True)), (40, [], Sizes(64, 16384, 2**26, 4096, False)),
    (80, [], Sizes(256, 16384, 2**26, 8192, False)),
    (141, [], Sizes(256, 16384, 2**26, 16384, False)),
    (None, ["--slots", "5"], Sizes(5, recompute=True)),
    (80, ["--slots", "5"], Sizes(5, 16384, 2**26, 8192, False)),
    (80, ["--gpu-memory", "16"], Sizes(recompute=True))])
def test_a_gpu_does_what_fits(gigabytes: float | None, flags: list[str], expected: Sizes) -> None:
    """A GPU would idle with a CPU's few slots and small batches, run out of memory, or compute
    layers twice that it could keep; or --slots or --gpu-memory would not be heeded."""
    config = Config.from_json(read_json(QWEN_7B))
    args = train.parser().parse_args(["--max-new-tokens", "512", *flags])
    prism, size = estimate.unloaded(config, args), gigabytes and gigabytes * 2**30
    assert estimate.choose_sizes(prism, args, size) == expected
    if gigabytes == 80 and not flags:
        assert estimate.choose_sizes(prism, args, size, 2048 - 128).slots == 64
    if gigabytes == 24:  # stage 5's settings do not change what stages 1 to 3 do at once
        args.rank = 128
        found = estimate.choose_sizes(estimate.unloaded(config, args), args, size)
        assert found == replace(expected, train_tokens=found.train_tokens)
        assert found.train_tokens < expected.train_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_planned_activations_are_an_upper_bound(family: str, dtype: torch.dtype,
                                                tiny_checkpoint: Tiny, monkeypatch: Patch) -> None:
    """What autograd really keeps of a batch, weights left out, is what is planned for the adapted
    layers (below them nothing is kept), or up to a quarter less; a twentieth more for what all
    layers share: the last norm's input, rotary tables, masks. The layers below make up for that.
    Weights are counted as they are loaded and trained."""
    net = load(tiny_checkpoint(family), dtype=dtype)
    net.config.dtype = dtype  # as --dry-run sets it
    prism, rows, length = randomize_adapter(PRISM(net, rank=4, dropout=0.1)), 4, 64
    flags = argparse.Namespace(gate_layer=0, rank=4, alpha=32.0)
    planned = estimate.unloaded(net.config, flags)
    for ours, theirs in ((net, planned.net), (prism.adapter, planned.adapter)):
        assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]
    monkeypatch.setattr(estimate, "PLAN_ROW", length)
    ids = torch.randint(5, 200, (rows, length), generator=torch.Generator().manual_seed(0))
    with one_thread():
        real = saved_bytes(lambda: net.hidden(ids, prism.adapter, rows, torch.Generator()), prism)
    if dtype != torch.float32:  # the copies of A and B in the base's dtype are weights
        real -= 2 * sum(p.numel() for p in prism.adapter.parameters())
    plan = estimate.activation_bytes(net.config, rows * length, 4)
    adapted = plan * sum(lora is not None for lora in prism.adapter) / len(net.layers)
    assert 0.75 <= real / adapted <= 1.05 and real <= plan


def test_more_shared_beginnings_are_held_than_planned(net: Transformer) -> None:
    """Rows whose beginnings all differ, as a judge's answers do: the caches that wait for later
    calls outgrow what the plan has for them, or a beginning is read anew though it is held."""
    reader = PrefixReader(net)
    reader.keep = 200
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        rows = torch.randint(5, 200, (4, 40), generator=generator).tolist()
        before = reader.tokens
        reader.read([*rows, rows[0]], [30, 24, 30, 30, 30])
        assert reader.tokens - before == 30 + 24 + 30 + 30 + 10 + 16 + 10 + 10 + 10
        held = {cache for cache, _ in reader.prefixes.values()}
        assert 100 < sum(cache.kv.shape[1] * cache.kv.shape[3] for cache in held) <= 200
        reader.read(rows[2:], [30, 30])
        assert reader.tokens - before == 170 + 20


@pytest.mark.parametrize(("heads", "ids"), [(32, 4096), (8, 16384)], ids=["llama-2", "mistral"])
def test_shared_beginnings_are_missing_in_the_plan(heads: int, ids: int) -> None:
    """At Llama-2-7B's shape 16,384 ids would be 8 GiB beside weights of 13: there 4,096 are held,
    at Mistral-7B's all of them; 2 GiB each, in stages 1 to 3."""
    config = Config.from_json({"model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096,
                               "intermediate_size": 11008, "num_hidden_layers": 32,
                               "num_attention_heads": 32, "num_key_value_heads": heads,
                               "torch_dtype": "bfloat16"}, "config.json")
    assert kept_tokens(config, config.dtype) == ids
    args = train.parser().parse_args([])
    plan = estimate.memory_plan(estimate.unloaded(config, args), 512, Sizes())
    for stage in ("1-2 answers", "3 verdicts"):
        assert plan[stage]["shared beginnings"] == ids * 32 * 2 * heads * 128 * 2 == 2**31


def test_arithmetic_of_training_is_miscounted(net: Transformer, monkeypatch: Patch) -> None:
    """Against what torch counts: recomputed layers cost nearly half more, not a third."""
    ids = torch.randint(5, 200, (8, 64), generator=torch.Generator().manual_seed(0))
    counted, expected = [], []
    for recompute in (False, True):
        monkeypatch.setattr(net, "sizes", Sizes(recompute=recompute))
        prism = randomize_adapter(PRISM(net, rank=1))
        with one_thread(), FlopCounterMode(display=False) as counter:
            net.hidden(ids, prism.adapter, len(ids)).sum().backward()
        counted.append(counter.get_total_flops())
        expected.append(estimate.training_flops(prism, ids.numel(), 0))
    assert counted == pytest.approx(expected, rel=0.15)
    assert counted[1] / counted[0] == pytest.approx(expected[1] / expected[0], rel=0.05)



def test_quick_is_estimated_as_it_is_billed(smollm: Transformer) -> None:
    """The time that a newcomer is told would be wrong by more than a half: `--quick` was billed
    22.1 and 23.6 TFLOP, of these 6 for stage 1."""
    prism = PRISM(smollm)
    whole = sum(expected_flops(prism, QUICK).values())
    assert 22.8e12 / 1.25 < whole < 22.8e12 * 1.25
    brought = sum(expected_flops(prism, QUICK, 40).values())
    assert 3e12 < whole - brought < 8e12
    assert sum(expected_flops(prism, QUICK | {"judge": "none"}).values()) < 0.8 * whole


@pytest.mark.parametrize(("count", "said"), [(0, "10 queries each, "), (2, " 2 queries, ")])
def test_queries_that_are_there(count: int, said: str, net: Transformer, run: RunFolder,
                                capsys: Capture) -> None:
    """Somebody's own queries would be counted as those that stage 1 writes."""
    run.write("queries.jsonl", [Query("math", i, "Why?") for i in range(count)])
    settings = QUICK | {"base_source": "folder", "model": "m", "device": "cpu", "dtype": "float32"}
    announce(PRISM(net), settings, run)
    assert said in capsys.readouterr().err
