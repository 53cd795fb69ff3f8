"""Values out of JSON files that others wrote, checked for type and range where they are read."""

from pathlib import Path
from typing import Any, NoReturn

from support.hub import InputError, optional_json

REQUIRED = object()  # stands for a default where there is none


class Fields:
    """A JSON object, and what errors call it.

    Every method reads one field and raises InputError, with its name, if the value is of another
    type or out of range (NaN and infinity are in no range). A null counts as missing: it gives the
    default, or an error where there is none.
    """

    def __init__(self, values: dict, where: str):
        self.values, self.where = values, where

    def refuse(self, name: str, why: str) -> NoReturn:
        """Raise the InputError about a field."""
        shown = str(self.values.get(name))[:60]
        raise InputError(f"{self.where}: {name} = {shown!r} {why}")

    def _typed(self, name: str, kind: type, default: Any, why: str) -> Any:
        """The value of a field if it is of this type."""
        value = self.values.get(name)
        if value is None and default is not REQUIRED:
            return default
        if not isinstance(value, kind):
            self.refuse(name, why)
        return value

    def number(self, name: str, low: float, high: float, default: Any = REQUIRED,
               kind: type | tuple = (int, float)) -> float:
        """A number in [low, high]; a bool is none, an integer counts as a float."""
        value = self.values.get(name)
        if value is None and default is not REQUIRED:
            return default
        if not is_number(value, low, high, kind):
            what = "an integer" if kind is int else "a number"
            self.refuse(name, f"is not {what} in [{low:g}, {high:g}]")
        return value

    def integer(self, name: str, low: int, high: int, default: Any = REQUIRED) -> int:
        """An integer in [low, high]."""
        return self.number(name, low, high, default, int)

    def integers(self, name: str, low: int, high: int) -> list[int]:
        """A list of integers in [low, high], which may be written as one of them, or be missing."""
        value = self.values.get(name)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(is_number(item, low, high, int) for item in found):
            self.refuse(name, f"is not a list of integers in [{low:g}, {high:g}]")
        return found

    def flag(self, name: str, default: bool = False) -> bool:
        """A true or false; the text "false" would count as true."""
        return self._typed(name, bool, default, "is neither true nor false")

    def text(self, name: str, default: Any = REQUIRED) -> str:
        """A text."""
        return self._typed(name, str, default, "is not a text")

    def object(self, name: str) -> dict:
        """An object of its own; empty if missing."""
        return self._typed(name, dict, {}, "is not an object")


def read_fields(path: Path) -> Fields:
    """The fields of a JSON file; none if it is absent."""
    return Fields(optional_json(path), str(path))


def is_number(value: object, low: float, high: float, kind: type | tuple = (int, float)) -> bool:
    """Whether a value from a JSON file is a number of this kind in [low, high]."""
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high
