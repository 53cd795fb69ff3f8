"""A checkpoint's chat template, compiled in a sandbox: it is a program that a stranger wrote."""

from __future__ import annotations

import json
from pathlib import Path

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from support.hub import InputError, read_text


class Generation(Extension):
    """The tag `{% generation %}...{% endgeneration %}`, which only marks text: rendered as is."""

    tags = {"generation"}

    def parse(self, parser):
        """Replace the block by its body."""
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def to_json(value: object, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple | None = None, sort_keys: bool = False) -> str:
    """The filter of that name, which does not escape for HTML as Jinja's own does."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    """What a template calls to refuse a conversation."""
    raise TemplateError(message)


def compile_template(folder: Path, field: object) -> Template:
    """The chat template of a folder: chat_template.jinja first, as transformers does, else the
    `field` of tokenizer_config.json.

    Raises:
        InputError: there is none, or it is broken.
    """
    path = folder / "chat_template.jinja"
    source = read_text(path) if path.exists() else field
    if isinstance(source, list):  # several named templates
        named = (t for t in source if isinstance(t, dict) and t.get("name") == "default")
        source = next(named, {}).get("template")
    elif isinstance(source, dict):
        source = source.get("default")
    if not isinstance(source, str):
        raise InputError(f"{folder}: no chat template; PRISM needs an instruction-tuned "
                         "model (chat_template.jinja or tokenizer_config.json)")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=[loopcontrols, Generation])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(source)
    except Exception as error:  # Python's own SyntaxError, too, for a break outside a loop
        raise InputError(f"{folder}: broken chat template ({error})") from None
