"""The files that make a tokenizer: tokenizer.json, what older folders keep beside it, the template.

Read as transformers reads them: where tokenizer_config.json has `added_tokens_decoder`, that file
says everything; in older folders special_tokens_map.json overrides it and added_tokens.json adds
tokens that tokenizer.json lacks. What a file names as a special token is one, whatever
tokenizer.json calls it.
"""

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from support.config import tokenizer_class
from support.hub import InputError, optional_json, read_text

THOUGHTS = ("<think>", "</think>")  # what a reasoning model puts around its thoughts
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
                 "mask_token")
# Where further ones are: a list, or an object with a name for each. OLDER is the list's older name.
EXTRA, OLDER = "extra_special_tokens", "additional_special_tokens"
OWN = "model_specific_special_tokens"
# Named by the classes of transformers, for a tokenizer_config.json that leaves them out.
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
GPT2 = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>",
         "mask_token": "<mask>"}
QWEN = dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
CLASS_NAMES = {"Llama": LLAMA, "CodeLlama": LLAMA, "GPT2": GPT2, "GPTNeoX": GPT2, "Gemma": GEMMA,
               "Qwen2": QWEN}
FLAGS = ("lstrip", "rstrip", "single_word")


def read_tokenizer(folder: Path) -> tuple[FastTokenizer, dict, dict[str, str]]:
    """The tokenizer of a checkpoint folder, its settings, and its special tokens by name.

    Raises:
        InputError: a broken file, or an added token or a special one that cannot be had.
    """
    path = folder / "tokenizer.json"
    text = read_text(path)
    with one_line(f"{path}: not a tokenizer"):
        tokenizer = FastTokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = optional_json(folder / "tokenizer_config.json")
    added = settings.get("added_tokens_decoder")
    older = {} if added is not None else optional_json(folder / "special_tokens_map.json")
    named, unnamed = special_tokens(settings, older)
    if not isinstance(unnamed, list) or not all(isinstance(text_of(t), str) for t in unnamed):
        raise InputError(f"{folder}: {EXTRA} is {str(unnamed)[:60]}, not a list of tokens")
    special = [*named.values(), *unnamed]
    with one_line(f"{folder}: its added tokens cannot be read"):
        if added is None:
            ids, texts = optional_json(folder / "added_tokens.json"), list(map(text_of, special))
            added = {i: {"content": text, "special": text in texts} for text, i in ids.items()}
        add_tokens(tokenizer, added, folder)
        names = checked_names(tokenizer, named, settings | older, folder)
        known = added_by_text(tokenizer)
        # Those that are nowhere yet get the ids that come next.
        tokenizer.add_special_tokens([known.get(text_of(token)) or added_token(token, True)
                                      for token in special])
        return with_plain_thoughts(tokenizer), settings, names


@contextmanager
def one_line(what: str) -> Iterator[None]:
    """InputError for whatever happens inside: the tokenizers library raises bare exceptions where
    a file is broken, and panics, which are no Exceptions."""
    try:
        yield
    except InputError:
        raise
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise InputError(f"{what} ({error!r})") from None
        raise


def with_plain_thoughts(tokenizer: FastTokenizer) -> FastTokenizer:
    """The tokenizer, the tokens of a think block being no special ones, whatever a file says: a
    template has to find them in a history, and they have to be seen in an answer."""
    known = added_by_text(tokenizer)
    if not any(known[text].special for text in THOUGHTS if text in known):
        return tokenizer
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] &= token["content"] not in THOUGHTS
    return FastTokenizer.from_str(json.dumps(content))


def special_tokens(settings: dict, older: dict) -> tuple[dict[str, object], object]:
    """The special tokens of tokenizer_config.json and special_tokens_map.json together, as these
    have them: those with a name (a null names nothing), and a list of others, to which the second
    file adds."""
    names = dict(settings)
    if OLDER in names and not names.get(EXTRA):
        names[EXTRA] = names.pop(OLDER)
    names = with_names(names)
    mine, more = names.get(EXTRA) or [], older.get(EXTRA)
    if isinstance(more, list):
        older = {**older, EXTRA: [*mine, *more] if isinstance(mine, list) else mine}
    # A name that only a model has is taken from the first file.
    single = {name: names[name] for name in names.keys() & (older.keys() - set(SPECIAL_NAMES))
              if name.endswith("_token")}
    names, found = with_names(names | older | single), {}
    for name, token in names.items():
        if name in SPECIAL_NAMES or (name.endswith("_token") and isinstance(text_of(token), str)):
            found[name] = token
    if isinstance(names.get(OWN), dict):
        found |= names[OWN]
    found = {name: token for name, token in found.items() if token is not None}
    return found, names.get(EXTRA, names.get(OLDER)) or []


def with_names(names: dict) -> dict:
    """The tokens that have a name under EXTRA, if any, moved to OWN."""
    extra, own = names.get(EXTRA), names.get(OWN)
    if not isinstance(extra, dict):
        return names
    rest = {name: token for name, token in names.items() if name != EXTRA}
    return {**rest, OWN: own | extra if isinstance(own, dict) else extra}


def text_of(token: object) -> object:
    """A special token's text; older files write it as an object."""
    return token.get("content") if isinstance(token, dict) else token


def added_by_text(tokenizer: FastTokenizer) -> dict[str, AddedToken]:
    """The tokenizer's added tokens by what they spell."""
    return {one.content: one for one in tokenizer.get_added_tokens_decoder().values()}


def added_token(token: object, special: bool) -> AddedToken:
    """An added token with the flags that a file gives it."""
    given = token if isinstance(token, dict) else {}
    flags = {name: bool(given.get(name)) for name in FLAGS}
    normalized = bool(given.get("normalized", not special))
    return AddedToken(text_of(token), normalized=normalized, special=special, **flags)


def add_tokens(tokenizer: FastTokenizer, added: object, folder: Path) -> None:
    """Give a tokenizer the tokens {id: {"content", "special", ...}} that are no added ones yet, or
    have other flags, in the order of their ids: those of the vocabulary, or that come next."""
    known = added_by_text(tokenizer)
    for number, token in sorted((int(number), token) for number, token in added.items()):
        text = token["content"]
        old = known.get(text)
        special = bool(token.get("special")) or (old is not None and old.special)
        new = added_token(token, special)
        # added_tokens.json has no flags.
        if old is None or ("lstrip" in token and new != old):
            add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
            add([new])
        if tokenizer.token_to_id(text) != number:
            raise InputError(f"{folder}: the added token {text[:40]!r} should be {number}, but "
                             f"tokenizer.json makes it {tokenizer.token_to_id(text)}")


def checked_names(tokenizer: FastTokenizer, named: dict, names: dict,
                  folder: Path) -> dict[str, str]:
    """bos_token and its like: those that the files name, and those of the tokenizer's class, which
    count only if the vocabulary has them."""
    kind = names.get("tokenizer_class") or tokenizer_class(optional_json(folder / "config.json"))
    kind = str(kind).removesuffix("Fast").removesuffix("Tokenizer")
    found = {name: text for name, text in CLASS_NAMES.get(kind, {}).items()
             if name not in names and tokenizer.token_to_id(text) is not None}
    for name, token in named.items():
        text = text_of(token)
        if not isinstance(text, str):
            raise InputError(f"{folder}: {name} is {str(text)[:60]}, not text")
        # Others get the next id: CodeLlama's config names one that no chat has a use for.
        if text and name in SPECIAL_NAMES and tokenizer.token_to_id(text) is None:
            raise InputError(f"{folder}: {name} is {text[:60]!r}, which tokenizer.json lacks")
        found[name] = text
    return found


# --------------------------------------------------------------------------------------------------
# The chat template: it is a program that a stranger wrote, compiled in a sandbox


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
