"""support/memory.py: the plan of --dry-run against figures by hand, and against what is kept."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Callable

import pytest
import torch
from tiny import one_thread, randomize_adapter
from torch import Tensor

import train
from lora import LoRA
from model import load
from prism import PRISM
from support import memory
from support.config import FAMILIES

Capture = pytest.CaptureFixture[str]
QWEN_7B = {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584,
           "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "torch_dtype": "bfloat16"}


def test_memory_plan_of_a_7b_model(tmp_path: Path, capsys: Capture) -> None:
    """From a config.json alone: weights and cache by hand, all five stages within 24 GB, not
    within 16; nothing is written."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    arguments = ["--dry-run", "--model", str(tmp_path / "config.json")]
    assert train.main(arguments) == 0
    out = capsys.readouterr().out
    layer = 3584 * (3584 + 2 * 512) + 3584 + 2 * 512 + 3584**2 + 3 * 3584 * 18944 + 2 * 3584
    weights = 2 * (28 * layer + 2 * 152064 * 3584 + 3584)
    cache = 32 * (512 + 512) * 28 * 2 * 4 * 128 * 2
    assert f"| 1-2 answers | {weights / 2**30:.2f} | {cache / 2**30:.2f} |" in out
    assert "| 24 GB | yes |" in out and "| 80 GB | yes |" in out
    assert train.main([*arguments, "--gpu-memory", "16"]) == 0
    assert "| 16 GB | no |" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_plan_of_every_family(family: str, tiny_checkpoint: Callable[..., Path],
                                     capsys: Capture) -> None:
    """The plan counts what is loaded and trained, for each architecture."""
    folder = tiny_checkpoint(family)
    net = load(folder)
    counts = memory.parameter_counts(net.config, argparse.Namespace(gate_layer=1, rank=4,
                                                                    alpha=8.0))
    assert counts == (sum(p.numel() for p in net.parameters()),
                      sum(p.numel() for p in PRISM(net, 4, 8.0, 1).adapter.parameters()))
    assert train.main(["--dry-run", "--model", str(folder)]) == 0
    assert "5 adapter" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_planned_activations_are_an_upper_bound(family: str, dtype: torch.dtype,
                                                tiny_checkpoint: Callable[..., Path],
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """What autograd really keeps of a batch, weights left out, is what is planned for the adapted
    layers (below them nothing is kept), or up to a quarter less; a twentieth more for what all
    layers share: the last norm's input, rotary tables, masks. The layers below make up for that."""
    net = load(tiny_checkpoint(family), dtype=dtype)
    net.config.dtype = dtype  # as --dry-run sets it
    prism, rows, length = randomize_adapter(PRISM(net, rank=4, dropout=0.1)), 4, 64
    monkeypatch.setattr(memory, "PLAN_ROW", length)
    held = {p.untyped_storage().data_ptr() for p in [*net.parameters(), *prism.parameters()]}
    for lora in (m for m in prism.adapter.modules() if isinstance(m, LoRA)):
        held |= {cast.untyped_storage().data_ptr() for cast in lora.cast(dtype)}
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t  # alive, so that no address is used again
        return t

    ids = torch.randint(5, 200, (rows, length), generator=torch.Generator().manual_seed(0))
    with one_thread(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net.hidden(ids, prism.adapter, rows, torch.Generator().manual_seed(0))
    real = sum(t.untyped_storage().nbytes() for at, t in kept.items() if at not in held)
    plan = memory.activation_bytes(net.config, rows * length, 4)
    adapted = plan * sum(lora is not None for lora in prism.adapter) / len(net.layers)
    assert 0.75 <= real / adapted <= 1.05 and real <= plan
