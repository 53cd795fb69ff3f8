"""The files that make a tokenizer: tokenizer.json, and what older folders keep beside it.

Read as transformers reads them: where tokenizer_config.json has `added_tokens_decoder`, that file
says everything; in older folders special_tokens_map.json overrides it and added_tokens.json adds
tokens that tokenizer.json lacks.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from support.hub import InputError, optional_json, read_text

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
# Named by the classes of transformers, for a tokenizer_config.json that leaves them out.
LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
GPT2 = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
CLASS_NAMES = {"Llama": LLAMA, "CodeLlama": LLAMA, "GPT2": GPT2, "GPTNeoX": GPT2, "Gemma": GEMMA,
               "Qwen2": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}}


def read_tokenizer(folder: Path) -> tuple[FastTokenizer, dict, dict[str, str]]:
    """The tokenizer of a checkpoint folder, its settings, and its special tokens by name.

    Raises:
        InputError: a broken file, or an added token or a special one that cannot be had.
    """
    path = folder / "tokenizer.json"
    try:
        tokenizer = FastTokenizer.from_str(read_text(path))
    except InputError:
        raise
    except Exception as error:  # the Rust library raises bare Exception for a bad file
        raise InputError(f"{path}: not a tokenizer ({error})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = optional_json(folder / "tokenizer_config.json")
    names, added = dict(settings), settings.get("added_tokens_decoder")
    if added is None:
        names |= optional_json(folder / "special_tokens_map.json")
        older = optional_json(folder / "added_tokens.json")
        special = [text_of(names.get(name)) for name in SPECIAL_NAMES]
        added = {i: {"content": text, "special": text in special} for text, i in older.items()}
    add_tokens(tokenizer, added, folder)
    return tokenizer, settings, special_tokens(tokenizer, names, folder)


def text_of(token: object) -> object:
    """A special token's text; older files write it as an object."""
    return token.get("content") if isinstance(token, dict) else token


def add_tokens(tokenizer: FastTokenizer, added: object, folder: Path) -> None:
    """Give a tokenizer the tokens {id: {"content", "special", ...}} that it lacks, in the order of
    their ids, which must be those that come next."""
    try:
        rows = sorted((int(number), token) for number, token in added.items())
        for number, token in rows:
            text = token["content"]
            if tokenizer.token_to_id(text) is None:
                flags = {name: bool(token.get(name)) for name in ("lstrip", "rstrip",
                                                                  "single_word")}
                special = bool(token.get("special"))
                normalized = bool(token.get("normalized", not special))
                one = AddedToken(text, normalized=normalized, special=special, **flags)
                if special:
                    tokenizer.add_special_tokens([one])
                else:
                    tokenizer.add_tokens([one])
            if tokenizer.token_to_id(text) != number:
                raise InputError(f"{folder}: the added token {text[:40]!r} should be {number}, but "
                                 f"tokenizer.json makes it {tokenizer.token_to_id(text)}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: its added tokens cannot be read ({error!r})") from None


def special_tokens(tokenizer: FastTokenizer, names: dict, folder: Path) -> dict[str, str]:
    """bos_token and its like: those that the files name, then those of the tokenizer's class, which
    count only if the vocabulary has them."""
    kind = str(names.get("tokenizer_class")).removesuffix("Fast").removesuffix("Tokenizer")
    found = {name: text for name, text in CLASS_NAMES.get(kind, {}).items()
             if tokenizer.token_to_id(text) is not None}
    for name in SPECIAL_NAMES:
        text = text_of(names.get(name))
        if text is None:
            continue
        if not isinstance(text, str):
            raise InputError(f"{folder}: {name} is {str(text)[:60]}, not text")
        if name in ("bos_token", "eos_token") and tokenizer.token_to_id(text) is None:
            raise InputError(f"{folder}: {name} is {text[:60]!r}, which tokenizer.json lacks")
        found[name] = text
    return found
