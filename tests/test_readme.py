"""README.md and docs/ cannot go stale: what they name is there, and they stay short and plain.

Names, flags, files and commands of all documents are checked against the code, README's Python
example and those of docstrings are run, and the diff of the fork guide has to stand in the files
that it changes.
"""

import argparse
import doctest
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from tiny import randomize_adapter, tiny_llama

from model import load
from prism import PRISM
from support.runs import FILES

ROOT = Path(__file__).parent.parent
DOCS = {path.name: path.read_text(encoding="utf-8")
        for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
ALL, README, FORKING = "\n".join(DOCS.values()), DOCS["README.md"], DOCS["forking.md"]
COMMANDS = ("train", "generate", "evaluate", "bench")
MODULES = [path.stem for path in ROOT.glob("*.py")] + [
    f"support.{path.stem}" for path in (ROOT / "support").glob("*.py")]
ENDINGS = ("py", "md", "txt", "json", "jsonl", "png", "safetensors", "jinja", "toml", "svg")
# Files that a run, an evaluation or a checkpoint has, and the code's folder does not.
ELSEWHERE = {name for names in FILES.values() for name in names} | {
    "run.json", "metrics.jsonl", "items.jsonl", "results.json", "table.md", "config.json",
    "my_contexts/", "benchmarks/"}
BENCHMARKS = (ROOT / "support" / "benchmarks.py").read_text(encoding="utf-8")
README_BYTES, MEAN_WORDS, LONG_WORDS, LONG_SHARE = 12_288, 20.0, 30, 0.15


def without_blocks(text: str) -> str:
    """A document without its fenced and indented code."""
    text = re.sub(r"^```.*?^```\n", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^ {4}.*\n", "", text, flags=re.MULTILINE)


# What stands between backticks in prose and tables; `module.Class.method` among it; command lines.
WORDS = sorted(set(re.findall(r"`([^`\n]+)`", without_blocks(ALL))))
NAMES = [w for w in WORDS if w.rpartition(".")[2] not in ENDINGS and re.fullmatch(
    rf"(?:{'|'.join(map(re.escape, MODULES))})(?:\.[A-Za-z_]\w*)+", w)]
FLAGS = sorted(set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)(?: (\w[\w,-]*))?", "\n".join(WORDS))))
LINES = sorted(set(re.findall(rf"^ {{4}}.*(?:python|\d) ((?:{'|'.join(COMMANDS)})\.py[^#\n]*)",
                              re.sub(r" \\\n +", " ", ALL), re.MULTILINE)))


def parser_of(script: str) -> argparse.ArgumentParser:
    """The command line of one of the four scripts."""
    return importlib.import_module(script).parser()


@pytest.mark.parametrize("name", ["device", "hub", "numbers", "refusals", "stats", "words"])
def test_worked_examples_are_true(name: str) -> None:
    """A docstring's example would not give what it says."""
    found = doctest.testmod(importlib.import_module(f"support.{name}"))
    assert found.failed == 0 < found.attempted


@pytest.mark.parametrize("name", NAMES)
def test_name_is_in_the_code(name: str) -> None:
    """A function, class or constant would have another name or home than a document says."""
    module = max((m for m in MODULES if name.startswith(f"{m}.")), key=len)
    found = importlib.import_module(module)
    for part in name[len(module) + 1:].split("."):
        found = getattr(found, part)


@pytest.mark.parametrize("line", LINES)
def test_command_is_understood(line: str) -> None:
    """A command line of a document would be refused by its script."""
    script, *arguments = shlex.split(line)
    parser_of(script.removesuffix(".py")).parse_args(arguments)


@pytest.mark.parametrize(("flag", "value"), FLAGS)
def test_flag_is_one_of_a_script(flag: str, value: str) -> None:
    """A flag in the prose, or a value beside it, would be gone, spelled otherwise or refused."""
    script = next(name for name in COMMANDS if flag in parser_of(name)._option_string_actions)
    if value and value != value.upper():  # else a placeholder
        least = ["--tasks", "mmlu"] if script == "evaluate" else []
        parser_of(script).parse_args([*least, flag, value])


@pytest.mark.parametrize("word", [w for w in WORDS if re.fullmatch(
    rf"[\w./-]+\.(?:{'|'.join(ENDINGS)})|[\w/]+/", w)])
def test_file_is_there(word: str) -> None:
    """A file or folder that a document names would have moved."""
    assert word in ELSEWHERE or word in BENCHMARKS or (ROOT / word).exists()


@pytest.mark.parametrize("document", DOCS)
def test_link_leads_somewhere(document: str) -> None:
    """A link to a file, or to a heading in one, would be dead."""
    folder = ROOT if document == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\((?!http)([^)]+)\)", DOCS[document]):
        path, _, heading = target.partition("#")
        assert (folder / path).exists(), target
        lines = (folder / path).read_text(encoding="utf-8").split("\n") if heading else []
        titles = [re.sub(r"[^\w -]", "", t.lstrip("# ").lower()).replace(" ", "-")
                  for t in lines if t.startswith("#")]
        assert not heading or heading in titles, target


def test_named_tests_are_there() -> None:
    """A document would point to a test that is gone."""
    source = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("*.py"))
    named = [w for w in WORDS if re.fullmatch(r"test_\w+", w)]
    assert named and [name for name in named if f"def {name}(" not in source] == []


def test_diff_of_the_fork_guide_is_in_the_code() -> None:
    """The guide's diff would not be what the code has: what it adds stands there, in its order."""
    diff = re.search(r"```diff\n(.*?)```", FORKING, re.DOTALL)[1]
    assert diff.count("\n") <= 40
    for part in diff.split("--- a/")[1:]:
        name, _, *hunks = re.split(r"^(?:\+\+\+|@@) .*\n", part, flags=re.MULTILINE)
        code, at = (ROOT / name.strip()).read_text(encoding="utf-8"), 0
        for hunk in hunks:
            added = "".join(re.findall(r"^\+(.*\n)", hunk, re.MULTILINE))
            at = code.find(added, at)
            assert added and at >= 0, hunk
            at += len(added)


def test_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                             capsys: pytest.CaptureFixture[str]) -> None:
    """README's example would fail where it is pasted; here on a tiny model's adapter."""
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    net = load(tiny_llama(tmp_path / "base"), dtype=torch.float32)
    net.name = str(tmp_path / "base")
    randomize_adapter(PRISM(net, rank=4)).save(tmp_path / "out" / "smollm2-135m-instruct")
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    exec(example, scope)
    assert len(example.strip().split("\n")) == 6 and len(capsys.readouterr().out) > 0
    assert [0 <= gate <= 1 for gate in scope["gates"]] == [True] * len(scope["talks"])


# --------------------------------------------------------------------------------------------------
# Plain and short


def sentences(text: str) -> list[str]:
    """The sentences of a document's prose: without code, tables, headings and pictures. An item of
    a list ends one; code between backticks is one word."""
    text = re.sub(r"^(?:#.*|\|.*|!\[.*|:?-+)$", "", without_blocks(text), flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", re.sub(r"`[^`]+`", "code", text))
    text = re.sub(r"^(?:[-*]|\d+\.) ", "\n\n", text, flags=re.MULTILINE)
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        words = " ".join(paragraph.split())
        found += re.split(r"(?<=[.?!])[*_)\"]* (?=[A-Z\"(`*]|code)", words)
    return [s for s in found if len(s.split()) > 2]


@pytest.mark.parametrize("document", DOCS)
def test_sentences_are_short(document: str) -> None:
    """A document would have to be read twice."""
    lengths = [len(s.split()) for s in sentences(DOCS[document])]
    long = [n for n in lengths if n > LONG_WORDS]
    assert sum(lengths) / len(lengths) <= MEAN_WORDS and len(long) <= LONG_SHARE * len(lengths)


def test_readme_is_short() -> None:
    """README would grow again, beyond what is read before the first command."""
    assert len(README.encode()) <= README_BYTES
