"""support/vocabulary.py against transformers: tokens and names from every file that may hold them,
and the places in tokenizer.py that depend on them."""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Sequence

import pytest
from conftest import edit_json
from support.messages import conversation
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from support.hub import InputError
from support.runs import run_date
from support.vocabulary import SPECIAL_NAMES, read_tokenizer
from tokenizer import Tokenizer

TURNS = ("{{ bos_token }}{% for m in messages %}<|turn|>{{ m.role }}\n{{ m.content }}<|over|>\n"
         "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}")
LINES = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
         "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
INST = ("{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} </s>{% else %}<s>"
        "[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}")
ENDS = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
BARE = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
TALK = [*conversation("Hi there"), {"role": "assistant", "content": "Hello"}, *conversation("Bye")]
LETTERS = ["\n", *map(chr, range(32, 127)), "Hi"]
MARKS = ["<|turn|>", "<|over|>"]
TURN, OVER = len(LETTERS), len(LETTERS) + 1  # the first ids behind the letters
EOS = {"eos_token": "</s>"}
SENTENCE = {"bos_token": "<s>"} | EOS
U10FFFF = "\u00f4\u0131\u00a5\u00bf"  # its four bytes in the alphabet of byte-level BPE
WIDE = "\uff1c/s\uff1e"  # what NFKC makes "</s>" of


def letters() -> FastTokenizer:
    """A tokenizer of single letters, and "Hi", without added tokens."""
    fast = FastTokenizer(models.BPE(dict(zip(LETTERS, range(TURN))), [("H", "i")]))
    fast.decoder = decoders.Fuse()
    return fast


def sentencepiece_like() -> FastTokenizer:
    """A tokenizer that puts a space before the first word of a text, as Llama 2's does."""
    fast = FastTokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"),
                                            normalizers.Replace(" ", "\u2581")])
    fast.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(),
                                      decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    texts = ["A B TIE How The user assistant [INST] [/INST] x\nA x\nB x\nHow x\nTIE"] * 50
    fast.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    fast.train_from_iterator([*texts, *LETTERS], trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
    return fast


def unigram() -> FastTokenizer:
    """A tokenizer like T5's or XLNet's: its control tokens are pieces that plain text may be put
    together from, a normalizer makes "</s>" out of wide characters, too, and some are unknown."""
    known = set("Hi there, how are you? <s> user assistant system <|> unk x") - {" "}
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("\u2581", -2.0), ("\u2581Hi", -1.0),
              ("[", 0.0), ("/", -9.0)]
    pieces += [(letter, -3.0) for letter in sorted(known)]
    fast = FastTokenizer(models.Unigram(pieces, unk_id=0))
    fast.normalizer = normalizers.NFKC()
    fast.pre_tokenizer = pre_tokenizers.Metaspace()
    fast.decoder = decoders.Metaspace()
    fast.add_special_tokens(["<unk>", "<s>", "</s>", "["])
    return fast


def byte_level(letters: str, special: Sequence[str], unknown: str = "<unk>") -> FastTokenizer:
    """A byte-level BPE tokenizer of some letters only, with room for control tokens behind them."""
    vocabulary = {one: i for i, one in enumerate(dict.fromkeys([*letters, *special]))}
    fast = FastTokenizer(models.BPE(vocabulary, [], unk_token=unknown))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    return fast


def write(folder: Path, template: str = TURNS, fast: FastTokenizer | None = None,
          special: Sequence[str] = (), plain: Sequence[str] = (), **files: dict) -> Path:
    """A tokenizer folder: that of single letters, if no other is given, with added tokens, special
    and plain ones; a template; JSON files by name. Returns it."""
    fast = fast or letters()
    fast.add_special_tokens(list(special))
    fast.add_tokens(list(plain))
    fast.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(template)
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | files.pop("tokenizer_config", {})
    for name, values in {"tokenizer_config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


RIGHT, WRONG = {"bos_token": "<|turn|>", "eos_token": "<|over|>"}, {"eos_token": "<|turn|>"}
OBJECTS = {name: {"content": text} for name, text in RIGHT.items()}
NAMED = [{"tokenizer_config": RIGHT},  # where there is a map, it has the last word
         *({"tokenizer_config": WRONG, "special_tokens_map": names} for names in (RIGHT, OBJECTS))]
ADDED = {"added_tokens": {"<|over|>": OVER, "<|turn|>": TURN}}
DECODER = {str(i): {"content": text, "special": True} for i, text in enumerate(MARKS, TURN)}


@pytest.mark.parametrize(("special", "files"), [
    *((MARKS, names) for names in NAMED), *(([], names | ADDED) for names in NAMED),
    ([], {"tokenizer_config": RIGHT | {"added_tokens_decoder": DECODER},
          "special_tokens_map": WRONG})])  # unread beside the decoder
def test_tokens_are_found_wherever_they_stand(special: list[str], files: dict,
                                              tmp_path: Path) -> None:
    """A turn marker would fall into characters, or an eos never stop an answer."""
    folder = write(tmp_path, special=special, **files)
    tok, peer = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    wanted = peer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert tok.render(TALK) == wanted and wanted.count(TURN) == 5
    assert tok.end_of_turn_ids == {peer.eos_token_id} == {OVER}


@pytest.mark.parametrize(("kind", "model", "named", "eos"), [
    ("Qwen2TokenizerFast", "llama", {}, "<|endoftext|>"),  # what the class says
    (None, "qwen2", {}, "<|endoftext|>"),  # what the model's class says
    ("Qwen2Tokenizer", "qwen2", {"eos_token": None}, None),  # a null is no default
    (None, "llama", {}, None)])
def test_names_of_the_tokenizers_class(kind: str | None, model: str, named: dict, eos: str | None,
                                       tmp_path: Path) -> None:
    """An eos token that a tokenizer_config.json leaves to its class would be missed."""
    folder = write(tmp_path, special=["<|turn|>", "<|endoftext|>"], config={"model_type": model},
                   tokenizer_config={"tokenizer_class": kind} | named)
    _, _, names = read_tokenizer(folder)
    assert names.get("eos_token") == eos and "bos_token" not in names


@pytest.mark.parametrize("flag", [None, "lstrip", "rstrip"])
@pytest.mark.parametrize("source", ["added_tokens_decoder", "added_tokens", "plain", "special"])
def test_an_added_token_of_the_vocabulary(source: str, flag: str | None, tmp_path: Path) -> None:
    """A turn marker would fall into characters, not take the white space beside it, or be forged
    where one file calls it special and the other plain."""
    marker = {"content": "Hi", "special": source != "special", "lstrip": False, "rstrip": False,
              "normalized": True, "single_word": False} | ({flag: True} if flag else {})
    at = LETTERS.index("Hi")
    files = {"tokenizer_config": {"added_tokens_decoder": {str(at): marker}}}
    if source == "added_tokens":
        files = {source: {"Hi": at}, "tokenizer_config": {"eos_token": "Hi"}}
    template = "{% for m in messages %}{{ m.content }} Hi {% endfor %}"
    stored = {source: ["Hi"]} if source in ("plain", "special") else {}  # in tokenizer.json
    folder = write(tmp_path, template, **stored, **files)
    tok, peer = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("x", "a b"):
        assert tok.render(conversation(text)) == peer.apply_chat_template(
            conversation(text), return_dict=False)
    assert tok.special_ids["Hi"] == at and at not in tok.encode("Hi")


TOKEN = {"__type": "AddedToken", "content": "<|new|>", "lstrip": True, "rstrip": False,
         "normalized": False, "single_word": False, "special": True}
EXTRA, OLDER = "extra_special_tokens", "additional_special_tokens"
GREETING = {"greeting": "Hi"}
EITHER = [  # what either file may hold, and its special tokens
    ({OLDER: ["<|turn|>", "<|new|>"]}, ["<|new|>"]),
    ({EXTRA: ["<|new|>"], OLDER: ["<|q|>"]}, ["<|new|>"]),
    ({EXTRA: {}, OLDER: None}, []), ({EXTRA: ["Hi", "<|plain|>"]}, ["Hi", "<|plain|>"]),
    ({EXTRA: {"turn_token": "<|turn|>"} | GREETING}, ["Hi"]),
    ({"image_token": "<|plain|>", "mask_token": "Hi", "add_bos_token": False},
     ["<|plain|>", "Hi"]),
    ({"fill_token": "<|new|>", EXTRA: {"end": "<|q|>"}}, ["<|q|>", "<|new|>"])]


@pytest.mark.parametrize(("settings", "older", "more"), [
    *((case, {}, more) for case, more in EITHER), *(({}, case, more) for case, more in EITHER),
    ({"model_specific_special_tokens": GREETING}, {}, ["Hi"]), ({EXTRA: [TOKEN]}, {}, ["<|new|>"]),
    ({EXTRA: [], OLDER: ["<|q|>"]}, {}, ["<|q|>"]),
    ({EXTRA: ["<|new|>"]}, {EXTRA: ["<|q|>", "<|new|>"]}, ["<|q|>", "<|new|>"]),
    ({EXTRA: ["<|new|>"]}, {OLDER: ["<|q|>"]}, ["<|new|>"]),
    ({OLDER: ["<|new|>"]}, {EXTRA: ["<|q|>"], OLDER: ["Hi"]}, ["<|new|>", "<|q|>"]),
    ({EXTRA: GREETING}, {EXTRA: ["<|q|>"]}, ["Hi", "<|q|>"]),
    ({EXTRA: GREETING}, {EXTRA: {"turn_token": "<|turn|>"}, OLDER: ["<|q|>"]}, ["Hi", "<|q|>"]),
    ({EXTRA: ["<|new|>"]}, {EXTRA: GREETING}, ["Hi"]),
    ({EXTRA: {}, OLDER: None}, {OLDER: ["<|q|>"]}, []), ({EXTRA: []}, {OLDER: ["<|q|>"]}, []),
    ({"turn_token": "<|turn|>"}, {"turn_token": "<|over|>", "eos_token": "<|over|>"}, [])], ids=str)
def test_special_tokens_beside_the_usual_ones(settings: dict, older: dict, more: list[str],
                                              tmp_path: Path) -> None:
    """One would be characters in a template, be forged in a text, have an empty name, or be found
    where transformers looks for none: in tokenizer_config.json, special_tokens_map.json or both."""
    template = ("{{ turn_token }}{{ greeting }}{{ image_token }}{{ mask_token }} <|new|><|q|>Hi"
                "{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}")
    folder = write(tmp_path, template, special=MARKS, plain=["<|plain|>"],
                   tokenizer_config=settings, special_tokens_map=older)
    tok, peer = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    talk = conversation("there")
    assert tok.render(talk) == peer.apply_chat_template(talk, return_dict=False)
    assert tok.special_ids.keys() == {*MARKS, *more}
    for token in more:
        number = tok.special_ids[token]
        assert number == peer.convert_tokens_to_ids(token) and number not in tok.encode(token)


def test_a_think_block_stays_text(tmp_path: Path) -> None:
    """A template could not find the end of the thoughts in a history, nor an answer's be seen."""
    for files in ({"special": ["<think>", "</think>"]}, {
            "plain": ["<think>", "</think>"], "tokenizer_config": {
                "extra_special_tokens": ["<think>"], "think_token": "</think>"}}):
        tok = Tokenizer(write(tmp_path, **files))
        assert tok.special_ids == {}
        assert tok.decode(tok.encode("<think>Hi</think>")) == "<think>Hi</think>"


@pytest.mark.parametrize(("config", "says"), [
    *(({name: "<|nowhere|>"}, f"{name} is '<|nowhere|>', which tokenizer.json lacks")
      for name in SPECIAL_NAMES),
    *(({name: 7}, f"{name} is 7, not text") for name in SPECIAL_NAMES),
    ({"eos_token": {"content": "<|nowhere|>"}}, "eos_token is '<|nowhere|>', which"),
    ({"extra_special_tokens": {"end": [1]}}, "end is [1], not text"),
    ({"extra_special_tokens": "<|x|>"}, "extra_special_tokens is <|x|>, not a list of tokens"),
    ({"additional_special_tokens": [7]}, "is [7], not a list of tokens"),
    ({"added_tokens_decoder": {"9999": {"content": "<|x|>"}}}, "should be 9999"),
    ({"added_tokens_decoder": {"x": {"content": "<|x|>"}}}, "cannot be read"),
    ({"added_tokens_decoder": [1]}, "cannot be read"),
    ({"added_tokens_decoder": {"1": {}}}, "cannot be read"),
    ({"bos_token": "\ud83d"}, "cannot be read"),
    ({"extra_special_tokens": ["\ud83d"]}, "cannot be read")])
def test_tokens_that_cannot_be_had_are_named(config: dict, says: str, tmp_path: Path) -> None:
    """The model would be given an id that it has no embedding for, or characters."""
    folder = write(tmp_path, tokenizer_config=config)
    with pytest.raises(InputError, match=re.escape(says)) as error:
        Tokenizer(folder)
    assert "\n" not in str(error.value)


def test_a_date_in_a_template_is_that_of_the_run(tmp_path: Path) -> None:
    """A run that goes on after midnight would read other prompts."""
    write(tmp_path, "{{ strftime_now('%d %b %Y') }}" + TURNS, special=MARKS)
    assert run_date(tmp_path) is None is run_date(None)
    (tmp_path / "run.json").write_text('{"date": "2026-11-26T23:59:00"}')
    dated = Tokenizer(tmp_path, run_date(tmp_path))
    assert dated.decode(dated.render(TALK)).startswith("26 Nov 2026")
    today = Tokenizer(tmp_path)
    assert datetime.now().strftime("%d %b %Y") in today.decode(today.render(TALK))
    (tmp_path / "run.json").write_text('{"date": "yesterday"}')
    with pytest.raises(InputError, match="run.json: date = 'yesterday' is no date"):
        run_date(tmp_path)


@pytest.mark.parametrize("template", [LINES, INST, BARE], ids=["lines", "inst", "bare"])
def test_words_are_encoded_where_they_stand(template: str, tmp_path: Path) -> None:
    """An opening, a letter or a piece of a text would have a space that its place has not, which is
    another token; or a raw few-shot prompt not begin as a text does."""
    folder = write(tmp_path, template, sentencepiece_like(), tokenizer_config=SENTENCE)
    tok, peer = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("How do the tides work?", "A", "TIE"):
        whole = tok.render(conversation(text), False)
        glued = [*tok.open_user_turn(None), *tok.encode_turn("user", text)]
        assert whole[:len(glued)] == glued and tok.decode(glued).endswith(text)
        assert tok.decode(tok.encode(text)) == text
        assert tok.encode(f"x\n{text}")[-len(tok.encode(text)):] == tok.encode(text)
        assert tok.encode_document(text) == peer(text).input_ids
    if template == LINES:  # the others have no header for an answer
        before = tok.render(conversation("x"))
        after = tok.render([*conversation("x"), {"role": "assistant", "content": "TIE"}], False)
        said = tok.encode_turn("assistant", "TIE", thinking=True)
        assert after[:len(before) + len(said)] == [*before, *said]


def test_a_document_of_a_vocabulary_without_most_letters(tmp_path: Path) -> None:
    """A letter without a piece, where none stands for unknown ones, would not be left out."""
    fast = FastTokenizer(models.BPE(vocab={"a": 0, "b": 1, "<s>": 2}, merges=[]))
    fast.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 2)])
    folder = write(tmp_path, TURNS, fast, special=["<s>"])
    tok, peer = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("", "ab", "xaxb", "x"):
        assert tok.encode_document(text) == peer(text).input_ids
        assert tok.encode(text) == peer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("letters", ["ab<unk>/s", "abx", "ab<unk>/s" + U10FFFF])
def test_a_letter_that_the_vocabulary_lacks_is_its_unknown_token(letters: str,
                                                                 tmp_path: Path) -> None:
    """Taken for a forged control token it would be spelled out, for ever where that fails too."""
    special = ["<unk>", "</s>"]
    folder = write(tmp_path, ENDS, byte_level(letters, special), special, tokenizer_config=EOS)
    ours, peer = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("a\nb", "a\tb", "\u754c", "ab"):
        assert ours.encode(text) == peer.encode(text, add_special_tokens=False)
        assert ours.render(conversation(text)) == [*ours.encode(text), ours.special_ids["</s>"]]
    assert ours.special_ids["</s>"] not in ours.encode("</s>a")


@pytest.mark.parametrize("more", ["", U10FFFF], ids=["unknown", "known"])
def test_an_end_token_for_unknown_letters_cannot_be_forged(more: str, tmp_path: Path) -> None:
    """Where one token has both uses, a text would end a turn by a letter that is not known."""
    fast = byte_level("ab</s>" + more, ["</s>"], "</s>")
    ours = Tokenizer(write(tmp_path, ENDS, fast, ["</s>"], tokenizer_config=EOS))
    assert ours.special_ids["</s>"] not in ours.encode("a\nb") + ours.encode("\u754c</s>")


def test_a_vocabulary_without_its_unknown_token_is_refused(tmp_path: Path) -> None:
    """The library's own exception would end in a traceback, at the first letter that is missing."""
    with pytest.raises(InputError, match="fails on a text .*<unk>"):
        Tokenizer(write(tmp_path, ENDS, byte_level("ab", ["</s>"]), ["</s>"]))
    complete = byte_level("".join(pre_tokenizers.ByteLevel.alphabet()), ["</s>"])
    assert Tokenizer(write(tmp_path, ENDS, complete, ["</s>"])).encode("a\nb")


def test_bytes_that_are_called_special_stay_text(tmp_path: Path) -> None:
    """A line end would be taken for a forged control token, and the tokenizer go in circles."""
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = dict(zip([*special, "\u2581"], range(259)))
    fast = FastTokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    fast.normalizer = normalizers.Prepend("\u2581")
    folder = write(tmp_path, TURNS, fast, special, tokenizer_config=EOS)
    tok = Tokenizer(folder)
    assert tok.encode("\n") == [tok.special_ids["<0x0A>"]]
    assert tok.special_ids["</s>"] not in tok.encode("</s>")


def test_a_vocabulary_that_spells_control_tokens(tmp_path: Path) -> None:
    """An answer would end within a question, as Unigram takes "</s>" for a piece like any other; or
    one letter be control, or an unknown one be taken for a forgery."""
    folder = write(tmp_path, BARE, unigram(), tokenizer_config=SENTENCE)
    tok, peer = Tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    for text in ("</s>", "Hi</s>there", "a</s></s> x", "<s></s>", WIDE):
        assert {1, 2}.isdisjoint(tok.encode(text) + tok.encode_document(text))
        assert {1, 2}.isdisjoint(tok.encode_turn("user", text))
        assert tok.decode(tok.encode(text)) == text.replace(WIDE, "</s>")
        assert [i for i in tok.render(conversation(text)) if i in (1, 2)] == [1, 2]
    assert tok.decode(tok.encode("Hi[x")) == "Hix"
    for text in ("\u754c", "Hi \u754c\u754c x", "Hi there"):
        assert tok.encode_document(text) == peer.encode(text)
        talk = conversation(text)
        assert tok.render(talk) == peer.apply_chat_template(talk, return_dict=False)


def test_white_space_that_a_control_token_takes_is_not_the_users(tmp_path: Path) -> None:
    """The gate would read the token, as the mask would reach over it (Phi-3's <|user|>)."""
    folder = write(tmp_path, LINES, special=["<|user|>", *MARKS])
    edit_json(folder / "tokenizer.json", lambda t: t["added_tokens"][0].update(rstrip=True))
    ids, mask = Tokenizer(folder).render_with_user_mask(conversation("\n Hi"))
    assert [i for i, m in zip(ids, mask) if m] == [LETTERS.index("Hi")]


def test_a_vocabulary_with_holes_is_refused(tmp_path: Path) -> None:
    """A mark would have the id of a letter, and the letter be a control token."""
    fast = FastTokenizer(models.BPE({"<s>": 0, "</s>": 1, "a": 2, "b": 4, "c": 5}, []))
    with pytest.raises(InputError, match="leaves out ids"):
        Tokenizer(write(tmp_path, BARE, fast, special=["<s>", "</s>"]))


@pytest.mark.parametrize("normalized", [False, True], ids=["", "normalized"])
def test_spelled_control_tokens_are_read_as_they_stand(normalized: bool, tmp_path: Path) -> None:
    """A space would stand behind each, where a tokenizer begins every text with one; or the
    template's own be letters in the middle of a text, as in the oldest files of Llama 2."""
    folder = write(tmp_path, INST, sentencepiece_like(), tokenizer_config=SENTENCE)
    edit_json(folder / "tokenizer.json", lambda t: [
        token.update(normalized=normalized) for token in t["added_tokens"]])
    tok = Tokenizer(folder)
    for text in ("Is <s>old</s>new HTML?", "</s>", "a </s> b", "<s><s>x"):
        ids = tok.render([*conversation(text), *TALK[1:]])
        assert tok.decode(ids, skip_special_tokens=False).count(f"[INST] {text} [/INST]") == 1
        assert [i for i in ids if i in (1, 2)] == [1, 2, 1]
        assert text in tok.decode(tok.encode_turn("user", text))
