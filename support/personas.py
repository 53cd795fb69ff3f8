"""Contexts to distil, one text file each: experts, policies, voices, tool registries ..."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence

from support.hub import InputError, read_text

# A context whose name begins so shows the gate where to stay closed, as ordinary traffic then does;
# --judge none distils nothing of it.
CONTRAST = "contrast"


def is_contrast(name: str) -> bool:
    """Whether a context of this name is a contrast."""
    return name.startswith(CONTRAST)


@dataclass(frozen=True)
class Persona:
    """A context to distil: its name (the file's) and its text (a system prompt)."""

    name: str
    text: str


def texts_by_name(personas: Sequence[Persona]) -> dict[str, str]:
    """The contexts' texts."""
    return {p.name: p.text for p in personas}


def load_personas(folder: Path) -> list[Persona]:
    """Read every *.txt of a folder (not below it), in name order.

    Raises:
        InputError: no such folder, no persona in it, one that is empty or not UTF-8, or two with
            the same text, which would compete for the same queries.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such personas folder")
    personas: list[Persona] = []
    for path in sorted(p for p in folder.glob("*.txt") if not p.name.startswith(".")):
        if not path.name.isprintable():  # not UTF-8, or with line ends: no name for tables and rows
            raise InputError(f"{str(path)!a}: the file's name is not printable text; rename it")
        text = read_text(path).strip()
        if not text:
            raise InputError(f"{path}: the persona is empty")
        for other in personas:
            if other.text == text:
                raise InputError(f"{path}: the same text as {other.name}.txt; remove one of them")
        personas.append(Persona(path.stem, text))
    if not personas:
        raise InputError(f"{folder}: no *.txt personas in this folder")
    return personas


def persona_hash(personas: Sequence[Persona]) -> str:
    """SHA-256 over names and texts."""
    texts = "\0".join(f"{p.name}\0{p.text}" for p in personas)
    return hashlib.sha256(texts.encode()).hexdigest()
