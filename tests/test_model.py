"""model.py against transformers: the same checkpoints, the same logits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Callable

import pytest
import torch
from conftest import build_tiny, copy_folder, edit_json, reference
from safetensors.torch import load_file, save_file
from torch import Tensor

import model
from engine import Engine, Request, Sampling
from generate import stop_tokens
from model import Transformer, load
from support.device import choose_dtype
from support.config import FAMILIES
from tokenizer import Tokenizer

TOLERANCE = 1e-4
LENGTHS = [5, 24, 11, 18]  # of a ragged batch; the second row fills it
TinyFactory = Callable[..., Path]


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
    """Four ragged rows in a right-padded batch: our logits equal transformers' at real tokens."""
    ids = random_ids(len(LENGTHS), max(LENGTHS), seed)
    ours, theirs = load(folder)(ids), oracle(folder, ids, LENGTHS)
    for row, length in enumerate(LENGTHS):
        assert_same(ours[row, :length], theirs[row, :length])
    return theirs


@torch.no_grad()
def decode_with_cache(net: Transformer, ids: Tensor, prompts: list[int], steps: int) -> Tensor:
    """Logits [B, steps, V] the engine's way: one padded prefill of ragged prompts, then one token a
    row at a time. Row b is fed ids[b, :prompts[b]], then ids[b, prompts[b]], ids[b, ...]."""
    rows, layers = torch.arange(len(prompts)), range(len(net.layers))
    cache = net.new_cache(len(prompts) + 1, max(prompts) + steps)  # one slot stays unused
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


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_family_logits_equal_transformers(family: str, tied: bool,
                                          tiny_checkpoint: TinyFactory) -> None:
    """A family would be computed wrongly: tied, untied, or in a right-padded batch."""
    folder = tiny_checkpoint(family, tie_word_embeddings=tied)
    stored = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in stored) is not tied  # the fixture really is what it says
    assert_parity(folder)


@pytest.mark.parametrize("family, overrides", [
    ("llama", {"num_key_value_heads": 4}),
    ("mistral", {"num_key_value_heads": 1, "head_dim": 24}),
], ids=["llama-mha", "mistral-mqa-wide-heads"])
def test_family_variants_equal_transformers(family: str, overrides: dict,
                                            tiny_checkpoint: TinyFactory) -> None:
    """One key head, as many as query heads, or a head_dim of its own would go wrong."""
    assert_parity(tiny_checkpoint(family, **overrides))


@pytest.mark.parametrize("family, shape", [
    *((family, {}) for family in FAMILIES),
    ("qwen2", {"num_attention_heads": 10, "num_key_value_heads": 2, "hidden_size": 80})],
    ids=[*FAMILIES, "many-heads-to-a-key-head"])
def test_cached_decoding_equals_full_forward(family: str, shape: dict,
                                             tiny_checkpoint: TinyFactory) -> None:
    """Decoding would drift from reading: with our KVCache, ragged prefill and token-by-token
    decoding give the logits that the cache-free forward and transformers give."""
    folder, steps, prompts = tiny_checkpoint(family, **shape), 7, [5, 11, 8]
    ids, net = random_ids(3, 18), load(folder)
    cached = decode_with_cache(net, ids, prompts, steps)
    plain, theirs = net(ids), oracle(folder, ids)
    for row, prompt in enumerate(prompts):
        wanted = slice(prompt - 1, prompt - 1 + steps)
        assert_same(cached[row], plain[row, wanted])
        assert_same(cached[row], theirs[row, wanted])


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_equal_transformers(family: str, tiny_checkpoint: TinyFactory) -> None:
    """The engine would answer otherwise: the ids that transformers' generate gives, through our
    engine with ragged slots."""
    folder, steps = tiny_checkpoint(family), 24
    prompts = [ids[:n].tolist() for ids, n in zip(random_ids(4, 24), LENGTHS)]
    engine = Engine(load(folder), Sampling(max_new_tokens=steps, temperature=0), set(), slots=3)
    ours = {out.index: out.ids for out in engine.run([Request(ids) for ids in prompts])}
    model = reference(folder)
    for i, ids in enumerate(prompts):
        made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=steps,
                              eos_token_id=None, pad_token_id=0)[0, len(ids):]
        assert ours[i] == made.tolist()
    assert len(set(sum(ours.values(), []))) > 5  # not all of them loops of one token


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_family_decodes_in_bf16_as_well_as_it_reads(family: str,
                                                    tiny_checkpoint: TinyFactory) -> None:
    """Few bf16 rows take products and norms of their own: they err as the whole text's do."""
    folder, ids = tiny_checkpoint(family), random_ids(4, 24)
    net, exact = load(folder, dtype=torch.bfloat16), load(folder)(ids)[:, 9:21]
    errors = [(x.float() - exact).square().mean().sqrt()
              for x in (net(ids)[:, 9:21], decode_with_cache(net, ids, [10] * 4, 12))]
    assert 0 < errors[1] < 1.5 * errors[0] < 0.3 * exact.std()


@torch.no_grad()
def test_prompt_read_in_two_pieces_equals_one(tiny_checkpoint: TinyFactory) -> None:
    """DESIGN 6: a suffix of several tokens read on top of a cached prefix, at ragged starts, gives
    the logits of the whole prompt."""
    net = load(tiny_checkpoint("qwen3"))
    ids, prefixes, suffix = random_ids(2, 20), [9, 4], 11
    layers, cache = range(len(net.layers)), net.new_cache(2, 20)
    for row, prefix in enumerate(prefixes):
        one = net.new_cache(1, prefix)
        net.run(net.embed(ids[row:row + 1, :prefix]), net.positions((1, prefix), one), layers)
        cache.copy(row, one, 0, prefix)
    start = torch.tensor(prefixes)
    pieces = torch.stack([ids[row, p:p + suffix] for row, p in enumerate(prefixes)])
    x = net.run(net.embed(pieces), net.positions(pieces.shape, cache, start, 20), layers)
    found, whole = net.head(net.norm(x)), net(ids)
    for row, prefix in enumerate(prefixes):
        assert_same(found[row], whole[row, prefix:prefix + suffix])


def test_padding_never_reaches_real_tokens(tiny_checkpoint: TinyFactory) -> None:
    """Right padding: what stands in it changes no logit of a real position, bit for bit."""
    net, ids = load(tiny_checkpoint("llama")), random_ids(4, 24)
    other = ids.clone()
    for row, length in enumerate(LENGTHS):
        other[row, length:] = 7
    a, b = net(ids), net(other)
    assert not torch.equal(a, b)  # the padding did change
    for row, length in enumerate(LENGTHS):
        assert torch.equal(a[row, :length], b[row, :length])


# --------------------------------------------------------------------------------------------------
# RoPE and sliding windows

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1000.0},
    "linear": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0},
    "llama3": {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0,
             "original_max_position_embeddings": 64},
    "yarn-no-original-length": {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0},
    "yarn-attention-factor": {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0,
                              "attention_factor": 0.8, "original_max_position_embeddings": 64},
    "yarn-mscale": {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 16.0, "mscale": 1.0,
                    "mscale_all_dim": 0.5, "original_max_position_embeddings": 64},
    "yarn-betas-not-truncated": {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0,
                                 "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False,
                                 "original_max_position_embeddings": 64},
}


def to_legacy_spelling(config: dict) -> None:
    """rope_parameters / dtype -> top-level rope_theta, rope_scaling and torch_dtype, as before
    transformers 5."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")


@pytest.mark.parametrize("legacy", [False, True], ids=["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("rope", ROPES)
def test_rope_kinds_equal_transformers(rope: str, legacy: bool, tiny_checkpoint: TinyFactory,
                                       tmp_path: Path) -> None:
    """Positions would be wrong in one RoPE kind or config spelling."""
    folder = tiny_checkpoint("llama", rope_parameters=ROPES[rope])
    plain = tiny_checkpoint("llama")
    if legacy:
        folder = copy_folder(folder, tmp_path / "legacy")
        edit_json(folder / "config.json", to_legacy_spelling)
    theirs = assert_parity(folder)
    other = oracle(plain, random_ids(len(LENGTHS), max(LENGTHS)), LENGTHS)
    # Same weights: the setting itself is worth far more than the tolerance.
    assert (theirs - other).abs().max() > 100 * TOLERANCE


def test_oldest_rope_spelling_is_read(tiny_checkpoint: TinyFactory, tmp_path: Path) -> None:
    """Old checkpoints call the kind `type`, and Llama 2's have neither rope_theta nor dtype."""
    source = tiny_checkpoint("llama", rope_parameters=ROPES["linear"])
    folder = copy_folder(source, tmp_path / "typed")

    def rename(config: dict) -> None:
        to_legacy_spelling(config)
        config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")

    edit_json(folder / "config.json", rename)
    ids = random_ids(2, 24)
    assert_same(load(folder)(ids), oracle(source, ids))

    usual = {"rope_type": "default", "rope_theta": 10000.0}
    bare = copy_folder(tiny_checkpoint("llama", rope_parameters=usual), tmp_path / "bare")
    edit_json(bare / "config.json", lambda c: [c.pop(n) for n in ("rope_parameters", "dtype")])
    net = load(bare)
    assert net.dtype == torch.float32
    assert_same(net(ids), oracle(bare, ids))


def without_layer_types(config: dict) -> None:
    """Configs from before transformers 4.53 have no layer_types: their older fields decide."""
    config.pop("layer_types", None)


@pytest.mark.parametrize("spelling", ["as-saved", "no-layer-types"])
@pytest.mark.parametrize("family, overrides, unwindowed", [
    ("mistral", {"sliding_window": 8}, {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
     {"use_sliding_window": False}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
     {"use_sliding_window": False}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 8}, {}),
    ("phi3", {"sliding_window": 8}, {}),
    ("gemma2", {"sliding_window": 8}, {"sliding_window": 100}),
    ("gemma3_text", {"layer_types": ["sliding_attention"] * 4},
     {"layer_types": ["sliding_attention"] * 4, "sliding_window": 100}),
    ("olmo3", {}, {"sliding_window": 100}), ("exaone4", {}, {"sliding_window": 100}),
], ids=["mistral", "qwen2", "qwen3", "smollm3", "phi3", "gemma2", "gemma3", "olmo3", "exaone4"])
def test_sliding_window_equals_transformers(family: str, overrides: dict, unwindowed: dict,
                                            spelling: str, tiny_checkpoint: TinyFactory,
                                            tmp_path: Path) -> None:
    """A window would be ignored, or off by one: on all layers (Mistral) or from max_window_layers
    on (Qwen), with and without cache, for contexts of three windows."""
    folder = copy_folder(tiny_checkpoint(family, **overrides), tmp_path / "c")
    if spelling == "no-layer-types":
        edit_json(folder / "config.json", without_layer_types)
    theirs = assert_parity(folder)
    ids = random_ids(len(LENGTHS), max(LENGTHS))
    full = oracle(tiny_checkpoint(family, **unwindowed), ids, LENGTHS)
    assert (theirs - full)[1].abs().max() > 100 * TOLERANCE  # the window matters ...
    assert (theirs - full)[:, :8].abs().max() < TOLERANCE  # ... from the ninth token on

    net, prompts, steps = load(folder), [3, 14, 8], 9
    cached = decode_with_cache(net, ids[:3], prompts, steps)
    whole = oracle(folder, ids[:3])
    for row, prompt in enumerate(prompts):
        assert_same(cached[row], whole[row, prompt - 1:prompt - 1 + steps])


def test_gemma3_fields_before_layer_types(tiny_checkpoint: TinyFactory, tmp_path: Path) -> None:
    """The released Gemma 3 files: a pattern instead of layer_types, and three fields for RoPE."""
    folder = copy_folder(tiny_checkpoint("gemma3_text"), tmp_path / "c")
    ids, before = random_ids(2, 24), load(folder)(random_ids(2, 24))
    edit_json(folder / "config.json", lambda c: ([c.pop(n) for n in (
        "layer_types", "rope_parameters", "_sliding_window_pattern")], c.update(
            sliding_window_pattern=3, rope_theta=2000.0, rope_local_base_freq=50.0,
            rope_scaling={"rope_type": "linear", "factor": 4.0})))
    assert load(folder).config.windows == [8, 8, None, 8]
    assert_same(load(folder)(ids), oracle(folder, ids))
    assert (load(folder)(ids) - before).abs().max() > 100 * TOLERANCE  # layer 3 has a window now


@pytest.mark.parametrize("fields, rotated", [
    ({"sliding_window": None, "layer_types": ["full_attention"] * 4}, [True] * 4),
    ({"sliding_window_pattern": "LLLG"}, [True, True, True, False]),
    ({"sliding_window": 8, "layer_types": ["full_attention"] * 4}, [False] * 4),
], ids=["no-window", "LLLG", "all-full"])
def test_exaone4_as_released(fields: dict, rotated: list[bool], tiny_checkpoint: TinyFactory,
                             tmp_path: Path) -> None:
    """EXAONE 4 rotates no queries and keys on full layers beside windows, and all without any: no
    field says so, and the other way round it would load and answer nonsense."""
    folder = copy_folder(tiny_checkpoint("exaone4"), tmp_path / "c")
    edit_json(folder / "config.json", lambda c: c.update(fields))
    if isinstance(fields.get("sliding_window_pattern"), str):  # only its layer_types are read there
        edit_json(folder / "config.json", without_layer_types)
        ours = load(folder)(random_ids(2, 24))
        assert_same(ours, oracle(tiny_checkpoint("exaone4"), random_ids(2, 24)))
    else:
        assert_parity(folder)
    assert load(folder).config.rotated == rotated


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


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def large(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80M random weights in many shards, 320 or 160 MB; one tensor is a fifth of them."""
    folder = build_tiny("llama", tmp_path_factory.mktemp("large"), vocab_size=16384,
                        hidden_size=1024, intermediate_size=2816, max_shard_size="40MB")
    assert len(list(folder.glob("*.safetensors"))) > 5
    for path in folder.glob("*.safetensors"):
        save_file({n: t.to(getattr(torch, request.param)) for n, t in load_file(path).items()},
                  path)
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_holds_little_more_than_the_weights(dtype: str, large: Path) -> None:
    """A model that fits would not load: peak anonymous memory (what a file cannot give back) at
    most 1.1 times the weights, whatever the files hold."""
    done = subprocess.run([sys.executable, "-c", LOAD, str(large), dtype], capture_output=True,
                          text=True, check=True, cwd=Path(model.__file__).parent)
    held, weights, samples = map(int, done.stdout.split())
    print(f"{dtype}: {held / weights:.3f} of {weights >> 20} MiB, {samples} samples")
    assert weights > 1.5e8 and samples > 20
    assert 0.9 * weights < held <= 1.1 * weights


def test_loading_freezes_and_casts(tiny_checkpoint: TinyFactory) -> None:
    """load gives a frozen model in eval mode, in the dtype asked for, else the
    checkpoint's."""
    folder = tiny_checkpoint("llama", dtype="float32")
    net, half = load(folder), load(folder, dtype=torch.bfloat16)
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert net.dtype == torch.float32
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    q = load_file(folder / "model.safetensors")["model.layers.1.self_attn.k_proj.weight"]
    at = 64  # rows of q come first: 4 heads of 16
    stacked = half.layers[1].self_attn.qkv_proj.weight[at:at + len(q)]
    assert torch.equal(stacked, q.to(torch.bfloat16))


# --------------------------------------------------------------------------------------------------
# The real model

PROMPTS = [
    "Hi!",
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "def fibonacci(n):\n    \"\"\"Return the n-th number.\"\"\"\n",
    "Explain gravity to a six-year-old child.",
    "Translate into French: The weather is nice today.",
    "List five fruits, separated by commas.",
    "What is 17 + 25? Think step by step.",
    "Give me a recipe for pancakes with three ingredients.",
    "Who wrote Hamlet, and when?",
    "Summarise in one sentence: The quick brown fox jumps over the lazy dog, which does not mind.",
    "为什么天空是蓝色的？",
    "Write a polite email asking my landlord to repair the heating. " * 4,
    "1, 1, 2, 3, 5, 8, what comes next?",
    "How do I reverse a list in Python?\n\n```python\nxs = [1, 2, 3]\n```",
    "Tell me a joke about computers.",
    "Is it safe to mix bleach and vinegar? 🧪",
    "Name a planet, a river and a composer.",
    "Complete: Once upon a time, in a village by the sea,",
    "What are the pros and cons of remote work for small teams in 2024?",
]


def test_smollm_greedy_equals_transformers(smollm_folder: Path, smollm32: Transformer,
                                           smollm_tok: Tokenizer) -> None:
    """Real answers would differ: SmolLM2's weights in fp32, greedy, 32 tokens: the ids that
    transformers' generate gives, through our engine with ten ragged slots."""
    prompts = [smollm_tok.render([{"role": "user", "content": text}]) for text in PROMPTS[::2]]
    stop = stop_tokens(smollm32, smollm_tok)
    engine = Engine(smollm32, Sampling(max_new_tokens=32, temperature=0), stop, slots=10)
    ours = {out.index: out.ids for out in engine.run([Request(ids) for ids in prompts])}

    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])  # generate pads on the left
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    made = reference(smollm_folder).generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=32, eos_token_id=sorted(stop),
        pad_token_id=0)[:, width:].tolist()
    theirs = {}
    for i, row in enumerate(made):
        ends = [at for at, token in enumerate(row) if token in stop]
        theirs[i] = row[:ends[0] + 1] if ends else row
    assert len({tuple(row) for row in theirs.values()}) == 10  # no two answers alike
    assert sum(map(len, theirs.values())) > 200
    assert ours == theirs


@pytest.mark.skipif(choose_dtype("auto", torch.device("cpu")) != torch.bfloat16,
                    reason="this CPU emulates bf16, at a tenth of fp32's speed")
@pytest.mark.parametrize("rows", [1, 4])
def test_smollm_decodes_in_bf16_as_well_as_it_reads(smollm_folder: Path, smollm32: Transformer,
                                                    smollm_tok: Tokenizer, rows: int) -> None:
    """A decoding step has products and norms of its own (few rows): measured against fp32, its
    logits are as good as those of the whole text read at once."""
    net = load(smollm_folder, dtype=torch.bfloat16)
    ids = torch.tensor([smollm_tok.encode(" ".join(PROMPTS))[i:i + 90] for i in range(0, 40, 10)])
    ids, steps = ids[:rows], 20
    exact = smollm32(ids)[:, 69:89].log_softmax(-1)
    read = net(ids)[:, 69:89].float().log_softmax(-1)
    decoded = decode_with_cache(net, ids, [70] * rows, steps).float().log_softmax(-1)
    error = [float((x - exact).square().mean().sqrt()) for x in (read, decoded)]
    assert 0 < error[1] < 1.5 * error[0] < 0.5


def test_smollm_config_is_the_real_one(smollm32: Transformer) -> None:
    """The default model is SmolLM2-135M: its published shape and size."""
    config = smollm32.config
    assert (config.num_layers, config.hidden_size, config.num_heads) == (30, 576, 9)
    assert (config.num_kv_heads, config.vocab_size, config.rope["rope_theta"]) == (3, 49152, 1e5)
    assert sum(p.numel() for p in set(smollm32.parameters())) == 134_515_008
