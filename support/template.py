"""A checkpoint's chat template, compiled in a sandbox: it is a program that a stranger wrote."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Callable

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from support.hub import InputError, read_text

MOST_STEPS = 10**6  # numbers that a template may count through, characters it may ask for at once


class Generation(Extension):
    """The tag `{% generation %}...{% endgeneration %}`, which only marks text: rendered as is."""

    tags = {"generation"}

    def parse(self, parser):
        """Replace the block by its body."""
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox (no private attributes, nothing can be changed), with less to ask for: loops
    within loops share one budget, and no product or power may be huge."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self, **options: object):
        super().__init__(**options)
        self.steps = 0  # of the rendering that is going on
        self.globals["range"] = self._range

    def _range(self, *arguments: int) -> range:
        """`range`, counted over the whole rendering."""
        numbers = range(*arguments)
        self.steps += len(numbers)
        if self.steps > MOST_STEPS:
            raise OverflowError(f"it counts through more than {MOST_STEPS} numbers")
        return numbers

    def call_binop(self, context: object, operator: str, left: object, right: object) -> object:
        """left * right or left ** right, if the result has a usual size."""
        def size(value: object) -> int:
            if isinstance(value, int):
                return value.bit_length() if operator == "**" else abs(value)
            return len(value) if hasattr(value, "__len__") else 1

        whole = isinstance(left, int) and isinstance(right, int)
        largest = (size(left) * abs(right) if operator == "**" and whole else
                   0 if whole else size(left) * size(right))
        if largest > MOST_STEPS:
            raise OverflowError(f"{operator} makes something of size {largest:.1e}")
        return super().call_binop(context, operator, left, right)


def compile_template(folder: Path, field: object, now: Callable[[], datetime]) -> Template:
    """The chat template of a folder: chat_template.jinja first, as transformers does, else the
    `field` of tokenizer_config.json.

    Args:
        now: the date for a template that writes one, asked for when it is rendered.

    Raises:
        InputError: there is none, or it is broken.
    """
    path = folder / "chat_template.jinja"
    source = read_text(path) if path.exists() else field
    if isinstance(source, list):  # several named templates
        named = (t for t in source if isinstance(t, dict) and t.get("name") == "default")
        source = next(named, {}).get("template")
    if not isinstance(source, str):
        raise InputError(f"{folder}: no chat template; PRISM needs an instruction-tuned "
                         "model (chat_template.jinja or tokenizer_config.json)")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True,
                          extensions=[loopcontrols, Generation])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: now().strftime(form)
    try:
        return environment.from_string(source)
    except (TemplateError, RecursionError, MemoryError) as error:
        raise InputError(f"{folder}: broken chat template ({error})") from None
