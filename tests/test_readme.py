"""README.md cannot go stale: the names, flags and files it gives are there."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = ("bench", "bootstrap", "evaluate", "generate", "judge", "lora", "model", "prism",
           "support", "tokenizer", "train")
NAMES = sorted(set(re.findall(rf"`((?:{'|'.join(MODULES)})\.[A-Za-z_.]+)`", README))
               - {f"{m}.{kind}" for m in MODULES for kind in ("py", "md", "png", "json")})  # files
LINES = re.sub(r" \\\n +", " ", README).split("\n")  # continued ones in one piece
COMMANDS = sorted({line.strip().partition("#")[0].strip() for line in LINES
                   if re.match(r" {4}.*python (train|generate|evaluate|bench)\.py", line)})


def test_there_is_something_to_check() -> None:
    """The patterns above still find the README's names and commands."""
    assert len(NAMES) >= 6 and len(COMMANDS) >= 4


@pytest.mark.parametrize("name", NAMES)
def test_function_is_where_the_readme_says(name: str) -> None:
    """`module.function` or `module.Class.method`."""
    module, *path = name.removeprefix("support.").split(".")
    home = "support." if name.startswith("support.") else ""
    found = importlib.import_module(home + module)
    for part in path:
        found = getattr(found, part)
    assert found.__doc__


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_understood(command: str) -> None:
    """Every command line of the README goes through the parser of its script."""
    words = shlex.split(command.rpartition("python ")[2])
    script = words[0].removesuffix(".py")
    importlib.import_module(script).parser().parse_args(words[1:])


@pytest.mark.parametrize("path", sorted(set(re.findall(
    r"`((?:tests|personas|docs)/[\w./]*\w)`|\]\(((?!http)[\w./]+)\)", README))))
def test_file_is_there(path: tuple[str, str]) -> None:
    """Files and folders that the README points to."""
    assert (ROOT / (path[0] or path[1])).exists()


def test_the_diff_of_an_architecture_is_in_the_code() -> None:
    """README's diff of EXAONE 4, at most 40 lines, would not be what stands in the files."""
    diff = re.search(r"```diff\n(.*?)```", README, re.DOTALL)[1]
    assert diff.count("\n") <= 40
    for part in diff.split("--- a/")[1:]:
        name, _, *hunks = re.split(r"^(?:\+\+\+|@@) .*\n", part, flags=re.MULTILINE)
        code, at = (ROOT / name.strip()).read_text(encoding="utf-8"), 0
        for hunk in hunks:
            added = "".join(re.findall(r"^\+(.*\n)", hunk, re.MULTILINE))
            at = code.find(added, at)
            assert added and at >= 0, hunk
            at += len(added)
