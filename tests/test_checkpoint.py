"""checkpoint.py: files, names and shapes of a checkpoint, and what is refused before loading."""

import re
from pathlib import Path

import pytest
import torch
from conftest import Folders, Tiny, build_tiny, copy_folder, edit_json, edit_tensors
from test_model import assert_parity, random_ids
from torch import Tensor

from model import load
from support.checkpoint import EMBEDDING, HEAD, fingerprint
from support.hub import InputError


@pytest.fixture(scope="module")
def sharded(tiny_checkpoint: Tiny, tmp_path_factory: Folders) -> Path:
    """The tiny qwen2 checkpoint (same weights as `tiny_checkpoint("qwen2")`) in several files."""
    folder = build_tiny("qwen2", tmp_path_factory.mktemp("shards"), max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) >= 3
    assert not (folder / "model.safetensors").exists()
    return folder


def test_sharded_checkpoint_equals_single_file(sharded: Path, tiny_checkpoint: Tiny) -> None:
    """Weights in several files would load otherwise than in one: every parameter is bit-equal."""
    single, split = load(tiny_checkpoint("qwen2")), load(sharded)
    theirs = single.state_dict()
    assert split.state_dict().keys() == theirs.keys() and len(theirs) > 20
    for name, value in split.state_dict().items():
        assert torch.equal(value, theirs[name]), name


K2 = "model.layers.2.self_attn.k_proj.weight"


@pytest.mark.parametrize(("family", "name", "tensor"), [
    ("llama", K2, None), ("llama", HEAD, None),
    ("qwen2", "model.layers.0.self_attn.v_proj.bias", None),
    ("qwen3", "model.layers.3.self_attn.q_norm.weight", None),
    ("llama", "model.layers.9.mlp.extra", torch.ones(2)),
    ("llama", "model.layers.0.self_attn.q_proj.bias", torch.ones(64)),
    ("llama", K2, torch.ones(64, 64)), ("llama", K2, torch.ones(32, 64, dtype=torch.int8)),
    ("llama", "model.norm.weight", torch.ones(1))],
    ids=["missing", "missing-head", "missing-bias", "missing-norm", "unexpected", "unexpected-bias",
         "wrong-rows", "integers", "broadcastable"])
def test_wrong_tensor_is_named(family: str, name: str, tensor: Tensor | None,
                               tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """A missing, unexpected or wrongly shaped tensor would be made up, ignored or not be named."""
    folder = copy_folder(tiny_checkpoint(family), tmp_path / "c")
    edit_tensors(folder / "model.safetensors",
                 lambda t: t.pop(name) if tensor is None else t.update({name: tensor}))
    with pytest.raises(InputError, match=re.escape(name)):
        load(folder)


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "granite"])
def test_head_in_a_tied_checkpoint(family: str, tiny_checkpoint: Tiny, tmp_path: Path) -> None:
    """Some tied checkpoints store lm_head too, a copy, and old ones rotary buffers: neither is an
    error. Another head than the embedding is used, as by transformers since version 5."""
    folder = copy_folder(tiny_checkpoint(family, tie_word_embeddings=True), tmp_path / "c")
    before = load(folder)(random_ids(1, 6))
    edit_tensors(folder / "model.safetensors", lambda t: t.update({
        HEAD: t[EMBEDDING].clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    net = load(folder)
    assert net.lm_head is net.embed_tokens and torch.equal(net(random_ids(1, 6)), before)
    edit_tensors(folder / "model.safetensors", lambda t: t.update({HEAD: t[EMBEDDING].flip(0)}))
    assert_parity(folder)
    assert load(folder, layers=1).lm_head.shape == net.lm_head.shape


def test_index_that_promises_too_much(sharded: Path, tmp_path: Path) -> None:
    """A tensor missing from its shard in the index, or a missing shard, would not be named."""
    folder, norm = copy_folder(sharded, tmp_path / "c"), "model.norm.weight"
    shards = sorted(path.name for path in folder.glob("model-*.safetensors"))

    def lie(index: dict) -> None:
        index["weight_map"][norm] = next(s for s in shards if s != index["weight_map"][norm])

    edit_json(folder / "model.safetensors.index.json", lie)
    with pytest.raises(InputError, match=norm):
        load(folder)
    (folder / shards[1]).unlink()
    with pytest.raises(InputError, match=shards[1]):
        load(folder)


def test_fingerprint_is_that_of_the_checkpoint(tiny_checkpoint: Tiny, sharded: Path,
                                               tmp_path: Path) -> None:
    """An adapter would be refused on its own base, loaded or copied elsewhere; or be taken on
    another, of another config or with one changed value in row 0 of a tensor."""
    folder = tiny_checkpoint("qwen2")
    found = [fingerprint(folder)]
    load(folder)
    copy = copy_folder(folder, tmp_path / "copy")
    assert fingerprint(folder) == fingerprint(copy) == found[0]
    assert fingerprint(sharded) == fingerprint(copy_folder(sharded, tmp_path / "shards"))
    edit_json(copy / "config.json", lambda config: config.update(rms_norm_eps=1e-3))
    found.append(fingerprint(copy))
    for name in (EMBEDDING, HEAD, "model.layers.0.self_attn.q_proj.weight",
                 "model.layers.3.mlp.down_proj.weight", "model.layers.2.self_attn.k_proj.bias",
                 "model.norm.weight"):
        edit_tensors(copy / "model.safetensors", lambda t: t[name].view(-1)[:1].add_(1.0))
        found.append(fingerprint(copy))
    assert len(set(found)) == len(found)
