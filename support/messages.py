"""Conversations, [{"role", "content"}, ...]: how they are made, read, checked and changed."""

import json
from pathlib import Path

from support.hub import InputError, read_text, unique_keys

ROLES = ("system", "user", "assistant")


def conversation(query: str, context: str = "") -> list[dict]:
    """A query as messages, with a context as system message or bare."""
    system = [{"role": "system", "content": context}] if context else []
    return [*system, {"role": "user", "content": query}]


def check_messages(messages: list[dict]) -> list[dict]:
    """Copy a conversation.

    Raises:
        InputError: it is not a non-empty list of {"role": str, "content": str} and nothing else, in
            valid Unicode, or a role is not one of ROLES: a template may write it as it is, so that
            another word could make a control token.
    """
    if not isinstance(messages, list) or not messages:
        raise InputError("a conversation is a non-empty list of messages")
    for m in messages:
        if not isinstance(m, dict) or not all(isinstance(m.get(f), str)
                                              for f in ("role", "content")):
            raise InputError('every message needs a "role" and a "content", both text')
        if m["role"] not in ROLES:
            raise InputError(f"{m['role'][:40]!r} is not a role (roles: {', '.join(ROLES)})")
        unknown = set(m) - {"role", "content"}
        if unknown:
            raise InputError(f"a message has the field {min(unknown)!r}; only role and content are "
                             "read here")
        if any("\ud800" <= c <= "\udfff" for c in m["content"]):
            raise InputError("a message contains half of a surrogate pair, which is not text")
    return list(messages)


def merge_system(messages: list[dict]) -> list[dict]:
    """Put the system text in front of the first user message, for models without a system role."""
    system, *rest = messages
    for i, m in enumerate(rest):
        if m["role"] == "user":
            rest[i] = {**m, "content": f"{system['content']}\n\n{m['content']}"}
            return rest
    raise InputError("a system message needs a user message after it with this model")


def with_system(messages: list[dict], system: str | None) -> list[dict]:
    """A conversation with a system message before it, unless it has its own or none is given."""
    if not system or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def read_prompts(path: Path) -> list[list[dict]]:
    """Conversations from a prompts file, one JSON object a line; blank lines are skipped.

    Raises:
        InputError: a line that is not such an object, by its number.
    """
    conversations = []
    for number, line in enumerate(read_text(path, any_size=True).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=unique_keys)
            if isinstance(row, dict) and isinstance(row.get("prompt"), str):
                row = {"messages": conversation(row["prompt"])}
            if not isinstance(row, dict) or "messages" not in row:
                raise InputError('needs "prompt" (text) or "messages" (a list)')
            conversations.append(check_messages(row["messages"]))
        except (ValueError, RecursionError) as error:
            why = error if isinstance(error, InputError) else f"not JSON ({error})"
            raise InputError(f"{path}, line {number}: {why}") from None
    if not conversations:
        raise InputError(f"{path}: no prompts in it")
    return conversations
