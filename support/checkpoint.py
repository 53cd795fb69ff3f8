"""A checkpoint folder: which files, which tensors, of which shapes, and whether one may trust them.

A Hugging Face checkpoint is one model.safetensors, or several files and an index that says which
tensor is in which. `destinations` maps its names to the decoder's parameters, which stack q, k and
v, and gate and up. `load` in model.py puts these pieces together.
"""

import hashlib
import math
from pathlib import Path
from typing import Iterator

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from support.config import Config
from support.hub import TEXT_FILES, InputError, read_json

# Our stacked projections -> the names of their parts in a Hugging Face model's layer
PARTS = {"qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
         "o_proj": ("self_attn.o_proj",), "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
         "down_proj": ("mlp.down_proj",)}
FUSED = {"qkv_proj": ("self_attn.qkv_proj",), "gate_up_proj": ("mlp.gate_up_proj",)}
FLOATING = ("F64", "F32", "F16", "BF16")  # safetensors' names of what weights may be stored in
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FINGERPRINT_ELEMENTS = 64  # of the first and the middle row of each tensor


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, from model.safetensors or from the index of a sharded checkpoint;
    InputError if there are none, or the index names a missing file, or one in another folder."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        with open_tensors(single) as file:
            return {name: single for name in file.keys()}
    if not index.is_file():
        raise InputError(f"{folder}: neither model.safetensors nor {index.name} is there")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: no weight_map")
    for shard in weight_map.values():
        if Path(str(shard)).name != shard or not (folder / shard).is_file():
            raise InputError(f"{index}: {shard!r} is no file in this folder")
    return {name: folder / shard for name, shard in weight_map.items()}


def open_tensors(path: Path) -> safe_open:
    """Open a safetensors file; a broken one is an InputError that names it."""
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error


def parts(config: Config) -> dict[str, tuple[str, ...]]:
    """Our stacked projections -> the names of their parts in a Hugging Face model's layer."""
    return PARTS | FUSED if config.family.fused else PARTS


def destinations(net: nn.Module, config: Config) -> dict[str, Tensor]:
    """Checkpoint tensor name -> its place in the decoder `net`, a view of a parameter's rows.

    A layer's norms have names of their own, and the stacked projections have several sources, one
    below the other; if the checkpoint has them fused, it is in the order in which we stack them.
    """
    found = {EMBEDDING: net.embed_tokens, "model.norm.weight": net.norm.weight}
    if net.lm_head is not net.embed_tokens:
        found[HEAD] = net.lm_head
    norms, stacks = config.family.norms, parts(config)
    for path, parameter in net.layers.named_parameters():
        layer, *owner, module, kind = path.split(".")  # of "0.self_attn.qkv_proj.weight"
        names = stacks.get(module) or [".".join([*owner, norms.get(module, module)])]
        widths = config.projections[module][1] if len(names) > 1 else len(parameter)
        for name, rows in zip(names, parameter.split(widths)):
            found[f"model.layers.{layer}.{name}.{kind}"] = rows
    return found


def check_headers(folder: Path, expected: dict[str, Tensor], files: dict[str, Path]) -> None:
    """InputError if a tensor is missing, unknown, of another shape or not floating point: asked of
    the files' headers before anything of the net's size is allocated. Old checkpoints may have
    rotary buffers beside the weights, which are left out."""
    present = {name for name in files if not name.endswith("rotary_emb.inv_freq")}
    wanted = set(expected)
    for kind, names in (("missing", wanted - present), ("unexpected", present - wanted)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"{folder}: {kind} tensor {min(names)}{more}")
    for name, found in stored({name: files[name] for name in expected}):
        shape = list(expected[name].shape)
        if found.get_shape() != shape or found.get_dtype() not in FLOATING:
            raise InputError(f"{files[name]}: tensor {name} is {found.get_dtype()} "
                             f"{found.get_shape()}, expected floating point {shape}")


def stored(files: dict[str, Path]) -> Iterator[tuple[str, object]]:
    """(name, safetensors' slice) one at a time, file by file: `[:]` reads it, so that only one
    tensor is held beside the net."""
    for path in sorted(set(files.values())):
        with open_tensors(path) as file:
            present = set(file.keys())
            for name in sorted(n for n, p in files.items() if p == path):
                if name not in present:
                    raise InputError(f"{path}: tensor {name} is in the index but not in the file")
                yield name, file.get_slice(name)


def head_is_copy(files: dict[str, Path]) -> bool:
    """Whether a checkpoint's head is its embedding once more."""
    a, b = (found[:] for _, found in stored({name: files[name] for name in (EMBEDDING, HEAD)}))
    return a.dtype == b.dtype and torch.equal(a, b)


def copy_weights(expected: dict[str, Tensor], files: dict[str, Path]) -> None:
    """Copy every tensor that has a place into it, in the dtype of the place; InputError on NaN or
    infinity, of which one makes every answer nonsense."""
    for name, found in stored({n: files[n] for n in expected}):
        part = expected[name].copy_(found[:])
        # A sum shows it, at a twentieth of isfinite's time; but a sum may overflow by itself.
        if not math.isfinite(part.sum()) and not bool(part.isfinite().all()):
            raise InputError(f"{files[name]}: tensor {name} holds NaN or infinity in "
                             f"{str(part.dtype).removeprefix('torch.')}; the file is damaged, or "
                             "needs another --dtype")


def text_fingerprint(folder: Path) -> str:
    """SHA-256 over the files that turn text into ids and end an answer: a run notices an edited
    chat template."""
    digest = hashlib.sha256()
    for name in TEXT_FILES:
        path = folder / name
        digest.update(name.encode() + (path.read_bytes() if path.exists() else b""))
    return digest.hexdigest()


def fingerprint(folder: Path) -> str:
    """SHA-256 over config.json and the start of two rows of every tensor: cheap, and in
    practice different for different weights. Identifies the base an adapter was trained on."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for name, rows in sorted(stored(checkpoint_files(folder)), key=lambda pair: pair[0]):
        if not rows.get_shape():
            raise InputError(f"{folder}: tensor {name} has no dimensions")
        for row in (0, rows.get_shape()[0] // 2):
            part = rows[row:row + 1].flatten()[:FINGERPRINT_ELEMENTS].contiguous()
            digest.update(name.encode() + part.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
