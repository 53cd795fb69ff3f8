"""checkpoint.py: files, names and shapes of a checkpoint, and what is refused before loading."""

from __future__ import annotations

from pathlib import Path
from typing import Callable

import pytest
import torch
from conftest import build_tiny, copy_folder, edit_json
from safetensors.torch import load_file, save_file
from test_model import assert_parity, random_ids
from torch import Tensor

from model import load
from support.checkpoint import EMBEDDING, HEAD, fingerprint
from support.hub import InputError

TinyFactory = Callable[..., Path]


@pytest.fixture(scope="module")
def sharded(tiny_checkpoint: TinyFactory, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny qwen2 checkpoint (same weights as `tiny_checkpoint("qwen2")`) in several files."""
    folder = build_tiny("qwen2", tmp_path_factory.mktemp("shards"), max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) >= 3
    assert not (folder / "model.safetensors").exists()
    return folder


def test_sharded_checkpoint_equals_single_file(sharded: Path, tiny_checkpoint: TinyFactory) -> None:
    """Weights in several files would load otherwise than in one: every parameter is bit-equal."""
    single, split = load(tiny_checkpoint("qwen2")), load(sharded)
    theirs = single.state_dict()
    assert split.state_dict().keys() == theirs.keys() and len(theirs) > 20
    for name, value in split.state_dict().items():
        assert torch.equal(value, theirs[name]), name
    assert_parity(sharded)


def rewrite_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Apply `change` to the tensors of model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


K2 = "model.layers.2.self_attn.k_proj.weight"


@pytest.mark.parametrize("family, change, named", [
    ("llama", lambda t: t.pop(K2), K2),
    ("llama", lambda t: t.pop("lm_head.weight"), "lm_head.weight"),
    ("qwen2", lambda t: t.pop("model.layers.0.self_attn.v_proj.bias"),
     "model.layers.0.self_attn.v_proj.bias"),
    ("qwen3", lambda t: t.pop("model.layers.3.self_attn.q_norm.weight"),
     "model.layers.3.self_attn.q_norm.weight"),
    ("llama", lambda t: t.update({"model.layers.9.mlp.extra": torch.ones(2)}),
     "model.layers.9.mlp.extra"),
    ("llama", lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
     "model.layers.0.self_attn.q_proj.bias"),
    ("llama", lambda t: t.update({K2: torch.ones(64, 64)}), K2),
    ("llama", lambda t: t.update({K2: torch.ones(32)}), K2),
    ("llama", lambda t: t.update({K2: torch.ones(32, 64, dtype=torch.int8)}), K2),
    ("llama", lambda t: t.update({"model.norm.weight": torch.ones(1)}), "model.norm.weight"),
    ("llama", lambda t: t.update({"model.embed_tokens.weight": torch.ones(257, 64)}),
     "model.embed_tokens.weight"),
], ids=["missing", "missing-head", "missing-bias", "missing-norm", "unexpected", "unexpected-bias",
        "wrong-rows", "wrong-rank", "integers", "broadcastable", "wrong-vocabulary"])
def test_wrong_tensor_is_an_error_that_names_it(family: str, change: Callable, named: str,
                                                tiny_checkpoint: TinyFactory,
                                                tmp_path: Path) -> None:
    """A missing, unexpected or wrongly shaped tensor is an error that names it."""
    folder = copy_folder(tiny_checkpoint(family), tmp_path / "c")
    load(folder)
    rewrite_tensors(folder, change)
    with pytest.raises(InputError) as caught:
        load(folder)
    assert named in str(caught.value)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "granite"])
def test_head_in_a_tied_checkpoint(family: str, tiny_checkpoint: TinyFactory,
                                   tmp_path: Path) -> None:
    """Some tied checkpoints store lm_head too, a copy, and old ones rotary buffers: neither is an
    error. Another head than the embedding is used, as by transformers since version 5."""
    folder = copy_folder(tiny_checkpoint(family, tie_word_embeddings=True), tmp_path / "c")
    before = load(folder)(random_ids(1, 6))
    rewrite_tensors(folder, lambda t: t.update({
        HEAD: t[EMBEDDING].clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    net = load(folder)
    assert net.lm_head is net.embed_tokens and torch.equal(net(random_ids(1, 6)), before)
    rewrite_tensors(folder, lambda t: t.update({HEAD: t[EMBEDDING].flip(0)}))
    assert_parity(folder)
    assert load(folder, layers=1).lm_head.shape == net.lm_head.shape


def test_index_with_a_missing_shard(sharded: Path, tmp_path: Path) -> None:
    """An index that names a file which is not there is an error that names the file."""
    folder = copy_folder(sharded, tmp_path / "c")
    victim = sorted(folder.glob("model-*.safetensors"))[1]
    victim.unlink()
    with pytest.raises(InputError, match=victim.name):
        load(folder)


def test_index_naming_a_tensor_the_shard_lacks(sharded: Path, tmp_path: Path) -> None:
    """A tensor that the index promises and the shard does not hold is named."""
    folder = copy_folder(sharded, tmp_path / "c")
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))

    def lie(index: dict) -> None:
        right = index["weight_map"]["model.norm.weight"]
        index["weight_map"]["model.norm.weight"] = next(s for s in shards if s != right)

    edit_json(folder / "model.safetensors.index.json", lie)
    with pytest.raises(InputError, match="model.norm.weight"):
        load(folder)


def test_fingerprint_is_stable(tiny_checkpoint: TinyFactory, sharded: Path,
                               tmp_path: Path) -> None:
    """An adapter would be refused on its own base: the fingerprint is a function of the checkpoint
    alone: loading changes nothing, and a copy elsewhere has the same one."""
    folder = tiny_checkpoint("qwen2")
    before = fingerprint(folder)
    load(folder)
    assert fingerprint(folder) == before and len(bytes.fromhex(before)) == 32
    assert fingerprint(copy_folder(folder, tmp_path / "copy")) == before
    assert fingerprint(sharded) == fingerprint(copy_folder(sharded, tmp_path / "shards"))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight",
                                  "model.layers.0.self_attn.q_proj.weight",
                                  "model.layers.3.mlp.down_proj.weight",
                                  "model.layers.2.self_attn.k_proj.bias", "model.norm.weight"])
def test_fingerprint_differs_for_other_weights(name: str, tiny_checkpoint: TinyFactory,
                                               tmp_path: Path) -> None:
    """An adapter would be taken on another base: other weights, another fingerprint: one changed
    value in row 0 is enough."""
    folder = copy_folder(tiny_checkpoint("qwen2"), tmp_path / "c")
    before = fingerprint(folder)
    rewrite_tensors(folder, lambda tensors: tensors[name].view(-1)[:1].add_(1.0))
    assert fingerprint(folder) != before


def test_fingerprint_covers_the_config(tiny_checkpoint: TinyFactory, tmp_path: Path) -> None:
    """config.json is part of the fingerprint."""
    folder = copy_folder(tiny_checkpoint("qwen2"), tmp_path / "c")
    before = fingerprint(folder)
    edit_json(folder / "config.json", lambda config: config.update(rms_norm_eps=1e-3))
    assert fingerprint(folder) != before
