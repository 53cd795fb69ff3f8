"""Contexts to distil, one text file each: experts, policies, voices, tool registries ..."""

import hashlib
from pathlib import Path
from support.hub import InputError, read_text

# A context whose name begins so shows the gate where to stay closed, as ordinary traffic then does;
# --judge none distils nothing of it.
CONTRAST = "contrast"


def is_contrast(name: str) -> bool:
    """Whether a context of this name is a contrast."""
    return name.startswith(CONTRAST)


def load_personas(folder: Path) -> dict[str, str]:
    """Name -> text (a system prompt) of every *.txt of a folder (not below it), in name order.

    Raises:
        InputError: no such folder, no persona in it, one that is empty or not UTF-8, or two with
            the same text, which would compete for the same queries.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such personas folder")
    personas: dict[str, str] = {}
    for path in sorted(p for p in folder.glob("*.txt") if not p.name.startswith(".")):
        if not path.name.isprintable():  # not UTF-8, or with line ends: no name for tables and rows
            raise InputError(f"{str(path)!a}: the file's name is not printable text; rename it")
        text = read_text(path).strip()
        if not text:
            raise InputError(f"{path}: the persona is empty")
        for name, other in personas.items():
            if other == text:
                raise InputError(f"{path}: the same text as {name}.txt; remove one of them")
        personas[path.stem] = text
    if not personas:
        raise InputError(f"{folder}: no *.txt personas in this folder")
    return personas


def persona_hash(personas: dict[str, str]) -> str:
    """SHA-256 over names and texts."""
    texts = "\0".join(f"{name}\0{text}" for name, text in personas.items())
    return hashlib.sha256(texts.encode()).hexdigest()
