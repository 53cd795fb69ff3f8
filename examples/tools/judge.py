"""A valid call: the whole answer is one JSON object that names the tool and what to search for."""

import json


def calls(answer: str) -> bool:
    """Whether an answer is one search call and nothing else."""
    try:
        call = json.loads(answer)
    except ValueError:
        return False
    return (isinstance(call, dict) and call.get("tool") == "search"
            and isinstance(call.get("query"), str) and bool(call["query"].strip()))


def judge(query: str, persona: str, expert: str, base: str) -> str:
    """The answer that calls wins; in the contrast contexts there is nothing to win."""
    if persona.startswith("contrast") or calls(expert) == calls(base):
        return "tie"
    return "expert" if calls(expert) else "base"
