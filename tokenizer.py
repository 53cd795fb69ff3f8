"""Text <-> token ids, and the ONLY place where a conversation becomes a prompt.

The ids are those of transformers' `apply_chat_template`: the checkpoint's own Jinja chat template,
in a sandbox, encoded without a second BOS. (tokenizer.json is read as it stands, as transformers 4
did; version 5 builds some classes anew, and then splits digits or spaces otherwise.) Three things
differ. Text that comes from people or models never yields a control token: a spelled-out
"<|im_end|>" stays plain characters. A control token that the template writes always is that token,
also where a file's `normalized` would make transformers read its letters. And a template that has
no system role (or drops it silently) gets the system text in front of the first user message.
"""

import contextlib
import re
from datetime import datetime
from functools import cached_property
from itertools import filterfalse, product
from pathlib import Path
from typing import Sequence

from jinja2 import Template
from tokenizers import Encoding

from support.hub import InputError, optional_json
from support.marks import Marks, any_of
from support.messages import check_messages, conversation, merge_system
from support.vocabulary import (THOUGHTS, added_by_text, compile_template, one_line,
                                read_tokenizer)

THINK, END_THINK = THOUGHTS
BYTE = "<0x[0-9A-F]{2}>"  # how a vocabulary spells a byte of a character that it lacks
PROBE = "prism probe text"  # shows whether a template renders what it is given
LEFT, RIGHT = "\ue003", "\ue004"  # brackets that no template knows
UNKNOWN_NAMES = ("unk_token", "pad_token")  # what an unknown character's token may be called
LEADS = "\n.x"  # what a text is put behind to be in the middle: the first that keeps its own ids


class Tokenizer:
    """The tokenizer of a checkpoint folder.

    Args:
        folder: holds tokenizer.json and, for `render`, a chat template (chat_template.jinja or the
            field of tokenizer_config.json).
        now: the date for templates that write one; a run keeps that of its beginning.

    Raises:
        InputError: tokenizer.json is missing or broken.
    """

    def __init__(self, folder: str | Path, now: datetime | None = None):
        self.folder, self.now = Path(folder), now or datetime.now()
        self._plain, self.config, self.names = read_tokenizer(self.folder)
        self._plain.encode_special_tokens = True  # as plain characters
        embeddings = optional_json(self.folder / "config.json").get("vocab_size")
        self.embeddings = embeddings if isinstance(embeddings, int) else None
        self.special_ids = self._control_tokens()
        self._marks = Marks(self._plain, self.special_ids, self.folder)
        self._control_ids = set(self.special_ids.values()) - self._stand_ins()

    def _control_tokens(self) -> dict[str, int]:
        """Control token -> id: the special tokens, and those that the template writes although they
        are not called special (DeepSeek-R1's turn marks). The tokens of a think block are left out:
        a template has to find them, as text, in a history."""
        added = added_by_text(self._plain)
        spelled = any_of(added)
        used, found = set(), {}
        answer = [{"role": "assistant", "content": "x"}]
        # A conversation in every way that one is rendered
        for system, last, thinking in product(("x", ""), ([], answer), (True, False)):
            talk = [*conversation("x", system), *answer, *conversation("x"), *last]
            with contextlib.suppress(InputError):  # no template, or one that refuses this
                used.update(spelled.findall(self._text(talk, not last, thinking)))
        ends = self.names.get("bos_token"), self.names.get("eos_token")
        for text, token in added.items():
            word = "".join(text.split()).isalnum()  # of a default system text, a role
            marks_turn = text in used and text.strip() and not word
            # One letter may be called special, such as "!" to pad with.
            special = token.special and (len(text) > 1 or text in ends)
            if (special or marks_turn) and text not in THOUGHTS:
                found[text] = self._plain.token_to_id(text)
        return found

    def _stand_ins(self) -> set[int]:
        """The ids that stand for a byte, or for a character that the vocabulary lacks. They are no
        control tokens in a text, although some tokenizers call them special, unless they have
        another use as well."""
        found = set(self._tokenize("\U0010ffff").ids)
        unknown = getattr(self._plain.model, "unk_token", None)
        found.add(self._plain.token_to_id(unknown or ""))
        for text, number in self.special_ids.items():
            if re.fullmatch(BYTE, text):
                found.add(number)
        for name, text in self.names.items():
            if name not in UNKNOWN_NAMES:
                found.discard(self.special_ids.get(text))
        return found

    def _tokenize(self, text: str) -> Encoding:
        """A text's encoding, without a BOS; control tokens are what has a mark."""
        with one_line(f"{self.folder}: tokenizer.json fails on a text"):
            return self._plain.encode(text, add_special_tokens=False)

    def encode(self, text: str) -> list[int]:
        """Plain text -> ids, as in the middle of a text: no BOS is added, no control token can come
        out, and no space stands before the first word, where sentencepiece would put one."""
        return self._model_ids(self._ids_behind(self._middle, text))

    def encode_document(self, text: str) -> list[int]:
        """Plain text that begins a document -> ids, with what the tokenizer puts in front (BOS)."""
        with one_line(f"{self.folder}: tokenizer.json fails to begin a text"):
            word = self._plain.post_process(self._tokenize("x"))
        front = word.ids[:[*word.special_tokens_mask, 0].index(0)]  # an "x" may have no id at all
        return self._known([*front, *self._model_ids(self._ids_behind([], text))])

    def encode_turn(self, role: str, text: str, system: bool = False,
                    thinking: bool = False) -> list[int]:
        """The ids of a text where it stands: at the beginning of a user's or an assistant's turn,
        behind what `open_user_turn` or `render` gives. The place decides how a first word is
        encoded.

        Args:
            role: "user" or "assistant".
            system: a system message comes before the user's text.
            thinking: of an assistant's turn, as in `render`.
        """
        if role == "user":
            before, ids = self._opened("x" if system else None)
        else:
            before = self._marks.swap(self._text(conversation("x"), True, thinking))
            ids = self._tokenize(before).ids
        return self._model_ids(self._ids_behind([(before, ids), *self._middle], text))

    def _ids_behind(self, places: Sequence[tuple[str, list[int]]], text: str) -> list[int]:
        """Plain text -> ids, behind the first of these (marked text, its ids) that it does not grow
        together with, or at the beginning of a text."""
        text = self._marks.plain(text)
        for before, ids in places:
            whole = self._tokenize(before + text).ids
            if whole[:len(ids)] == ids:
                return whole[len(ids):]
        return self._tokenize(text).ids

    @cached_property
    def _middle(self) -> list[tuple[str, list[int]]]:
        """What a text is put behind to be in the middle of one. Nothing, unless a text's first word
        is encoded as if a space stood before it."""
        word = self._tokenize("x").ids
        if self._tokenize("\nx").ids[-len(word):] == word:
            return []
        return [(lead, self._tokenize(lead).ids) for lead in LEADS]

    def _model_ids(self, ids: list[int]) -> list[int]:
        """The model's ids for those of a text with marks. A control token that a vocabulary puts
        plain text together from (Unigram) is replaced by the ids of its letters."""
        found = []
        for number in ids:
            if number in self._marks.ids:
                found.append(self._marks.ids[number])
            elif number not in self._control_ids:
                found.append(number)
            else:
                for letter in self._plain.id_to_token(number):
                    spelled = self._ids_behind(self._middle, letter)
                    found += filterfalse(self._control_ids.__contains__, spelled)
        return self._known(found)

    def _known(self, ids: list[int]) -> list[int]:
        """The ids; InputError if the model has no embedding for one. (A vocabulary may have tokens
        without, as long as no text makes use of them.)"""
        if self.embeddings is not None and max(ids, default=-1) >= self.embeddings:
            raise InputError(f"{self.folder}: tokenizer.json makes token {max(ids)}, but the model "
                             f"has {self.embeddings} embeddings; it belongs to another model")
        return ids

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Ids -> text."""
        ids = filterfalse(self._marks.ids.__contains__, ids)  # a model may have ids to spare
        return self._plain.decode(list(ids), skip_special_tokens=skip_special_tokens)

    @cached_property
    def _template(self) -> Template:
        """The compiled chat template."""
        return compile_template(self.folder, self.config.get("chat_template"))

    def _text(self, messages: list[dict], add_generation_prompt: bool,
              thinking: bool = True) -> str:
        """The conversation as text, by the model's own template; see `render` for `thinking`."""
        template, switch = self._template, {}
        if not thinking:
            switch = {"enable_thinking": False}
        try:
            text = template.render(messages=messages, tools=None, documents=None,
                                   add_generation_prompt=add_generation_prompt,
                                   **{"strftime_now": self.now.strftime, **self.names, **switch})
        except Exception as error:
            # Whatever a template does wrong is the template's fault.
            raise InputError(f"{self.folder}: the chat template fails on this conversation "
                             f"({type(error).__name__}: {error})") from None
        if add_generation_prompt and not thinking and text.rstrip().endswith(THINK):
            # A template without that switch; this is what Qwen3's writes.
            text = f"{text.rstrip()}\n\n{END_THINK}\n\n"
        return text

    @cached_property
    def has_system_role(self) -> bool:
        """Whether a system message shows up in the rendering; some templates drop it silently."""
        try:
            return PROBE in self._text(conversation("x", PROBE), False)
        except InputError:
            return False

    @cached_property
    def end_of_turn_id(self) -> int | None:
        """The control token that the template puts right after an assistant's text; by some
        templates only before the next message."""
        talk = [*conversation("x"), {"role": "assistant", "content": PROBE}]
        found = self._control_after(talk, False)
        if found is None:
            found = self._control_after(talk + conversation("x"), False)
        return found

    @cached_property
    def end_of_user_id(self) -> int | None:
        """The control token right after a user's text: mostly `end_of_turn_id`; with Mistral and
        DeepSeek-R1 it is the header of the assistant's turn."""
        return self._control_after(conversation(PROBE), True)

    def _control_after(self, messages: list[dict], add_generation_prompt: bool) -> int | None:
        """The first control token behind the last PROBE, if nothing else stands before it."""
        _, hit, after = self._text(messages, add_generation_prompt).rpartition(PROBE)
        found = self._marks.spelled.match(after.lstrip()) if hit else None
        return self.special_ids[found.group()] if found else None

    @cached_property
    def end_of_turn_ids(self) -> set[int]:
        """The template's end of turn and the tokenizer's eos token."""
        eos = self.special_ids.get(self.names.get("eos_token"))
        return {eos, self.end_of_turn_id} - {None}

    @cached_property
    def opens_thinking(self) -> bool:
        """Whether the assistant's header opens a think block, so that answers begin within it."""
        return self._text(conversation("x"), True).rstrip().endswith(THINK)

    def without_thoughts(self, text: str) -> str:
        """What an assistant's text says after its think block: all of it if there is no block, ""
        if the block was never closed."""
        if not self.opens_thinking and not text.lstrip().startswith(THINK):
            return text
        return text.rpartition(END_THINK)[2].lstrip() if END_THINK in text else ""

    def render(self, messages: list[dict], add_generation_prompt: bool = True,
               return_user_mask: bool = False,
               thinking: bool = True) -> list[int] | tuple[list[int], list[bool]]:
        """The ids of a conversation [{"role", "content"}, ...] in the model's chat format.

        Args:
            add_generation_prompt: end with the header of the assistant's turn.
            return_user_mask: return what `render_with_user_mask` does.
            thinking: False where the very next token is to be an answer's, not a thought's: turns
                thoughts off by the template's `enable_thinking`, and closes a think block that the
                generation prompt opens (empty, as in arXiv 2504.09858).

        Raises:
            InputError: the messages are malformed or the template refuses them.
        """
        if return_user_mask:
            return self.render_with_user_mask(messages, add_generation_prompt, thinking)
        _, encoding = self._encode(messages, add_generation_prompt, thinking)
        return self._model_ids(encoding.ids)

    def render_with_user_mask(self, messages: list[dict], add_generation_prompt: bool = True,
                              thinking: bool = True) -> tuple[list[int], list[bool]]:
        """`render`, and for every id whether it belongs to the text of the last user message: what
        a gate that pools by mean reads."""
        text, encoding = self._encode(messages, add_generation_prompt, thinking)
        start, end = self._last_user_span(messages, text, add_generation_prompt, thinking)
        ids, mask = [], []
        for token, (first, last) in zip(encoding.ids, encoding.offsets):
            spelled = self._model_ids([token])
            inside = first < end and last > start and last > first
            ids += spelled
            # A control token may have taken white space beside it along.
            mask += [inside and token not in self._marks.ids] * len(spelled)
        return ids, mask

    def _safe(self, messages: list[dict]) -> list[dict]:
        """Checked messages for the template: no forged control tokens, and the system text where
        the template shows it."""
        messages = check_messages(messages)
        if messages[0]["role"] == "system" and not self.has_system_role:
            messages = merge_system(messages)
        return [{**m, "content": self._marks.guard(m["content"])} for m in messages]

    def _encode(self, messages: list[dict], *how: bool) -> tuple[str, Encoding]:
        """A conversation as rendered text, and the encoding of that text with marks.

        Raises:
            InputError: more control tokens than the same conversation has with harmless text, or
                others than with that text disarmed: the template has put one together from pieces
                of a message.
        """
        messages = self._safe(messages)
        harmless, disarmed = [], []
        numbers: dict[str, str] = {}
        for m in messages:
            plain, said = m["content"], m["content"].strip()
            if said:  # a template may skip an empty message, or one that repeats another
                plain = numbers.setdefault(said, f"x{len(numbers)}")
            harmless.append({**m, "content": plain})
            disarmed.append({**m, "content": self._marks.disarm(m["content"])})
        text = self._text(messages, *how)
        control_of = self._marks.spelled.findall
        control = control_of(text)
        most = len(control_of(self._text(harmless, *how)))
        if len(control) > most or control != control_of(self._text(disarmed, *how)):
            raise InputError(f"{self.folder}: the chat template makes a control token out of a "
                             "message's text; take its odd pieces out of the text")
        return text, self._tokenize(self._marks.swap(text))

    def render_shared(self, messages: list[dict], thinking: bool = True) -> tuple[list[int], int]:
        """The prompt ids of a conversation, and how many of them come before its first user text:
        conversations with the same system message share these."""
        ids = self.render(messages, thinking=thinking)
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        other = self.render(conversation("\n", system), thinking=thinking)
        return ids, common_prefix(ids, other)

    def open_user_turn(self, system: str | None) -> list[int]:
        """The ids of a conversation with this system message (None: without one), up to where the
        user's text begins.

        A model that continues them writes what a user would type (Magpie, arXiv 2406.08464).
        """
        return self._model_ids(self._opened(system)[1])

    def _opened(self, system: str | None) -> tuple[str, list[int]]:
        """The same, as text and as ids, both with marks."""
        messages = [] if system is None else [{"role": "system", "content": system}]
        text, encoding = self._encode([*messages, *conversation(PROBE)], False)
        # Encoded with a user text in place: "\n\n" at the end of a text is another token than
        # before a word.
        end = text.rfind(PROBE)
        if end < 0:
            raise InputError(f"{self.folder}: the chat template changes what a user says, so "
                             "nothing can be put in its place")
        before = self._marks.swap(text[:end])
        ids = []
        for token, (_, last) in zip(encoding.ids, encoding.offsets):
            if last <= len(before):
                ids.append(token)
        return before, ids

    def _last_user_span(self, messages: list[dict], text: str, *how: bool) -> tuple[int, int]:
        """Character range of the last user message's text within its rendering with marks."""
        for last in reversed(range(len(messages))):
            if messages[last]["role"] == "user":
                break
        else:
            raise InputError("a gate that pools over the user's text needs a user message")
        said = messages[last]["content"]
        inner = said.strip()
        # Another text in its place; or the same, for a template that looks at it, between brackets,
        # with or without the white space that a template may trim.
        for other in (PROBE, LEFT + said + RIGHT, said.replace(inner, LEFT + inner + RIGHT, 1)):
            talk = list(messages)
            talk[last] = {**talk[last], "content": other}
            probed = self._text(self._safe(talk), *how)
            for found in re.finditer(f"{PROBE}|{LEFT}.*{RIGHT}", probed, re.DOTALL):
                before, after = probed[:found.start()], probed[found.end():]
                rest = len(text) - len(after)
                if len(before) <= rest and text.startswith(before) and text.endswith(after):
                    return len(self._marks.swap(before)), len(self._marks.swap(text[:rest]))
        if not inner:
            return 0, 0
        raise InputError(f"{self.folder}: the chat template hides the user's text; "
                         "use --gate-pool last")


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix of two id lists, at least one id short of a's end."""
    n = 0
    while n < min(len(a) - 1, len(b)) and a[n] == b[n]:
        n += 1
    return n
