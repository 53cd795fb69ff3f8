"""model.py against transformers: the same checkpoints, the same logits."""

import subprocess
import sys
from pathlib import Path
from typing import Sequence

import pytest
import torch
from conftest import Folders, Tiny, build_tiny, reference
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import model
from engine import Engine, Request
from generate import stop_tokens
from model import KVCache, Transformer, load
from sampling import Sampling
from support.config import FAMILIES
from tokenizer import Tokenizer

TOLERANCE = 1e-4
LENGTHS = [12, 24, 17, 20]  # of a ragged batch; the second row fills it
STEPS = 9  # of them at the end are decoded


def random_ids(rows: int, columns: int, seed: int = 1, vocabulary: int = 256) -> Tensor:
    """Token ids [rows, columns], the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (rows, columns), generator=generator)


@torch.no_grad()
def oracle(folder: Path, ids: Tensor, lengths: list[int] | None = None) -> Tensor:
    """transformers' logits [B, T, V] of right-padded ids [B, T], its attention mask included."""
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths or []):
        mask[row, length:] = 0
    return reference(folder)(ids, attention_mask=mask, use_cache=False).logits


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Logits within the tolerance, and varied enough for that to mean something."""
    assert theirs.std() > 0.5
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def assert_parity(folder: Path, seed: int = 1) -> Tensor:
    """Four ragged rows in a right-padded batch: our logits equal transformers' at real tokens, read
    at once and, the last of them, token by token from a cache."""
    ids, net = random_ids(len(LENGTHS), max(LENGTHS), seed), load(folder)
    ours, theirs = net(ids), oracle(folder, ids, LENGTHS)
    cached = decode_with_cache(net, ids, [n - STEPS + 1 for n in LENGTHS], STEPS)
    for row, length in enumerate(LENGTHS):
        assert_same(ours[row, :length], theirs[row, :length])
        assert_same(cached[row], theirs[row, length - STEPS:length])
    return theirs


def greedy(model: PreTrainedModel, prompts: list[list[int]], steps: int,
           stop: Sequence[int] | None = None) -> list[list[int]]:
    """What transformers' generate answers to ragged prompts, in one batch."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])  # generate pads on the left
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=steps,
                          eos_token_id=stop, pad_token_id=0)[:, width:].tolist()


def answers(net: Transformer, prompts: list[list[int]], steps: int, stop: set[int],
            slots: int) -> dict[int, list[int]]:
    """What our engine answers to them, by their index."""
    engine = Engine(net, Sampling(max_new_tokens=steps, temperature=0), stop, slots=slots)
    return {out.index: out.ids for out in engine.run([Request(ids) for ids in prompts])}


@torch.no_grad()
def decode_with_cache(net: Transformer, ids: Tensor, prompts: list[int], steps: int) -> Tensor:
    """Logits [B, steps, V] the engine's way: one padded prefill of ragged prompts, then one token a
    row at a time. Row b is fed ids[b, :prompts[b]], then ids[b, prompts[b]], ids[b, ...]."""
    rows, layers = torch.arange(len(prompts)), range(len(net.layers))
    cache = KVCache(net, len(prompts) + 1, max(prompts) + steps)  # one slot stays unused
    lengths = torch.tensor(prompts)
    padded = ids[:, :max(prompts)].clone()
    padded[torch.arange(max(prompts)) >= lengths[:, None]] = 255  # what is there must not matter
    x = net.run(net.embed(padded), net.positions(padded.shape, cache), layers)
    found = [net.head(net.norm(x[rows, lengths - 1]))]
    for step in range(steps - 1):
        start = lengths + step
        at = net.positions((len(prompts), 1), cache, start, max(prompts) + step + 1)
        x = net.run(net.embed(ids[rows, start][:, None]), at, layers)
        found.append(net.head(net.norm(x[:, -1])))
    return torch.stack(found, dim=1)


# --------------------------------------------------------------------------------------------------
# Families


@pytest.mark.parametrize("family, fields", [
    *((family, {"tie_word_embeddings": tied}) for family in FAMILIES for tied in (False, True)),
    ("llama", {"num_key_value_heads": 4}), ("mistral", {"num_key_value_heads": 1, "head_dim": 24}),
    ("qwen2", {"num_attention_heads": 10, "num_key_value_heads": 2, "hidden_size": 80})], ids=str)
def test_family_logits_equal_transformers(family: str, fields: dict, tiny_checkpoint: Tiny) -> None:
    """A family would be computed wrongly: tied, untied, padded, or decoded with our KVCache; or one
    key head, as many as query heads, or a head_dim of its own."""
    folder = tiny_checkpoint(family, **fields)
    stored = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in stored) is not fields.get("tie_word_embeddings", False)
    assert_parity(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_equal_transformers(family: str, tiny_checkpoint: Tiny) -> None:
    """The engine's ids, with ragged slots, would not be those of transformers' generate."""
    folder, steps = tiny_checkpoint(family), 24
    prompts = [ids[:n].tolist() for ids, n in zip(random_ids(4, 24), LENGTHS)]
    ours = answers(load(folder), prompts, steps, set(), slots=3)
    assert ours == dict(enumerate(greedy(reference(folder), prompts, steps)))
    assert len(set(sum(ours.values(), []))) > 5  # not all of them loops of one token


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_family_decodes_in_bf16_as_well_as_it_reads(family: str, tiny_checkpoint: Tiny) -> None:
    """Few bf16 rows take products and norms of their own: they err as the whole text's do. A loaded
    model would train, or not have the dtype asked for, else the checkpoint's."""
    folder, ids = tiny_checkpoint(family), random_ids(4, 24)
    net, exact = load(folder, dtype=torch.bfloat16), load(folder)(ids)[:, 9:21]
    assert not any(p.requires_grad for p in net.parameters()) and net.dtype == torch.bfloat16
    assert exact.dtype == torch.float32 and not net.training
    errors = [(x.float() - exact).square().mean().sqrt()
              for x in (net(ids)[:, 9:21], decode_with_cache(net, ids, [10] * 4, 12))]
    assert 0 < errors[1] < 1.5 * errors[0] < 0.3 * exact.std()


# --------------------------------------------------------------------------------------------------
# Loading


LOAD = """
import sys, threading, torch, model
torch.ones(10**6).to(torch.bfloat16).sum()  # what torch starts with its first operations

def anonymous():
    lines = open("/proc/self/status").read().split("\\n")
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.0005):
        held.append(anonymous())

held, done = [anonymous()], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
net = model.load(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
done.set()
thread.join()
held.append(anonymous())
print(max(held) - held[0], sum(p.numel() * p.element_size() for p in net.parameters()), len(held))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: Folders) -> Path:
    """80M random weights in many shards, 320 MB; one tensor is a fifth of them."""
    folder = build_tiny("llama", tmp_path_factory.mktemp("large"), vocab_size=16384,
                        hidden_size=1024, intermediate_size=2816, max_shard_size="40MB")
    assert len(list(folder.glob("*.safetensors"))) > 5
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_holds_little_more_than_the_weights(dtype: str, large: Path) -> None:
    """A model that fits would not load: peak anonymous memory (what a file cannot give back) at
    most 1.1 times the weights, whatever the files hold."""
    done = subprocess.run([sys.executable, "-c", LOAD, str(large), dtype], capture_output=True,
                          text=True, check=True, cwd=Path(model.__file__).parent)
    held, weights, samples = map(int, done.stdout.split())
    assert weights > 1.5e8 and samples > 20
    assert 0.9 * weights < held <= 1.1 * weights


# --------------------------------------------------------------------------------------------------
# The real model

PROMPTS = [
    "Hi!", "What is the capital of France?", "1, 1, 2, 3, 5, 8, what comes next?",
    "def fibonacci(n):\n    \"\"\"Return the n-th number.\"\"\"\n",
    "Translate into French: The weather is nice today.", "What is 17 + 25? Think step by step.",
    "Summarise in one sentence: The quick brown fox jumps over the lazy dog, which does not mind.",
    "为什么天空是蓝色的？", "Is it safe to mix bleach and vinegar? 🧪",
    "Write a polite email asking my landlord to repair the heating. " * 4,
    "How do I reverse a list in Python?\n\n```python\nxs = [1, 2, 3]\n```",
    "What are the pros and cons of remote work for small teams in 2024?"]


def test_smollm_greedy_equals_transformers(smollm_folder: Path, smollm32: Transformer,
                                           smollm_tok: Tokenizer) -> None:
    """Real answers would differ: SmolLM2's weights in fp32, greedy, 32 tokens on each prompt: the
    ids that transformers' generate gives, through our engine with ragged slots."""
    prompts = [smollm_tok.render([{"role": "user", "content": text}]) for text in PROMPTS]
    stop = stop_tokens(smollm32, smollm_tok)
    theirs = {}
    for i, row in enumerate(greedy(reference(smollm_folder), prompts, 32, sorted(stop))):
        ends = [at for at, token in enumerate(row) if token in stop]
        theirs[i] = row[:ends[0] + 1] if ends else row
    assert len({tuple(row) for row in theirs.values()}) == len(prompts)  # no two answers alike
    assert sum(map(len, theirs.values())) > 20 * len(prompts)
    assert answers(smollm32, prompts, 32, stop, slots=len(prompts)) == theirs
