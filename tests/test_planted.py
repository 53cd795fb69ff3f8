"""A planted truth, end to end on SmolLM2's real weights.

Real verdicts are noisy, so the machinery is proved on one that is not: a context whose effect can
be seen by a rule (every reply starts with "Ahoy!"), and verdicts set by a rule on the topic.
On held-out queries the gate must open for that topic only, the adapter must show the behaviour
without the prompt, and where the gate stays closed nothing may change.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import bootstrap
from bootstrap import Query, Verdict, won_pairs, write_answers
from engine import Sampling
from generate import Completion, generate
from model import Transformer
from prism import PRISM
from support.personas import Persona
from support.runs import RunFolder
from support.settings import check, parser
from tokenizer import Tokenizer
from train import run_gate, run_lora

pytestmark = pytest.mark.slow  # it needs real training: minutes

SAILOR = Persona("sailor", 'You are a sailor. You start each reply with "Ahoy!" and then answer '
                           "the question.")
FOODS = ("lentil soup", "apple pie", "fried rice", "pancakes", "tomato sauce", "potato salad",
         "garlic bread", "roast chicken", "fruit cake", "cheese omelettes", "mushroom risotto",
         "vegetable curry", "chocolate cookies", "beef stew", "grilled fish", "noodle soup",
         "pumpkin pie", "spinach lasagna", "banana bread", "fried eggs")
PROGRAMS = ("a binary search", "a web server", "a sorting function", "a linked list", "a unit test",
            "a database query", "a regular expression", "a hash table", "a for loop", "a compiler",
            "a Python class", "a shell script", "a recursive function", "a text parser",
            "a chat program", "a backup script", "a login page", "a stack in C", "a calculator",
            "a file reader")
FIT = 10  # of the twenty things of each topic; the others are held out
GREEDY = Sampling(12, 0.0)


def questions(verb: str, things: tuple[str, ...]) -> list[str]:
    """Two questions about every thing."""
    return [f"How {word} I {verb} {thing}?" for thing in things for word in ("do", "can")]


def ahoy(answers: list[Completion]) -> float:
    """Share of answers that show the behaviour."""
    return sum(a.text.lstrip().startswith("Ahoy") for a in answers) / len(answers)


def ask(model: Transformer | PRISM, tokenizer: Tokenizer, asked: list[str],
        system: str | None = None, gate: str = "auto") -> list[Completion]:
    """Greedy answers."""
    head = [{"role": "system", "content": system}] if system else []
    return generate(model, tokenizer, [[*head, {"role": "user", "content": q}] for q in asked],
                    GREEDY, gate)


def test_planted_truth(smollm: Transformer, smollm_tok: Tokenizer, tmp_path: Path,
                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Cooking would not open the gate and get the sailor, or programming not the base model."""
    net = smollm
    monkeypatch.setattr(bootstrap, "ANSWER_TEMPERATURE", 0.0)
    fit = [questions("cook", FOODS[:FIT]), questions("write", PROGRAMS[:FIT])]
    queries = [Query("sailor", i, q) for i, q in enumerate(fit[0] + fit[1])]
    args = parser().parse_args(["--epochs", "6", "--batch-size", "4", "--queries", "1",
                                "--max-new-tokens", "12", "--lr", "1e-3"])
    check(args)
    run = RunFolder(tmp_path)
    pairs = write_answers(run, net, smollm_tok, [SAILOR], queries, args.max_new_tokens, 0)
    topic = [int(i < len(fit[0])) for i in range(len(queries))]
    verdicts = [Verdict("sailor", i, "expert" if t else "base", t, "rule", [])
                for i, t in enumerate(topic)]
    run.write("verdicts.jsonl", verdicts)
    prism = PRISM(net, gate_layer=len(net.layers) // 6, gate_pool="mean")
    run_gate(run, prism, smollm_tok, pairs, verdicts, args)
    run_lora(run, prism, smollm_tok, [SAILOR], won_pairs(pairs, verdicts), set(), args)
    run.close()
    prism = PRISM.load(tmp_path, net)

    cooking, programming = questions("cook", FOODS[FIT:]), questions("write", PROGRAMS[FIT:])
    opened, closed = ask(prism, smollm_tok, cooking), ask(prism, smollm_tok, programming)
    prompted = ahoy(ask(net, smollm_tok, cooking, SAILOR.text))
    base = ask(net, smollm_tok, cooking)
    right = sum(a.routed for a in opened) / len(opened)
    wrong = sum(a.routed for a in closed) / len(closed)
    shown = [a for a in opened if a.routed]
    print(f"gate open: {right:.2f} of the topic, {wrong:.2f} of the other; behaviour: prompt "
          f"{prompted:.2f}, adapter {ahoy(shown):.2f}, base {ahoy(base):.2f}, closed "
          f"{ahoy(closed):.2f}")
    assert prompted >= 0.8 and ahoy(base) == 0  # the planted behaviour is the context's
    assert right >= 0.95 and wrong <= 0.05
    assert ahoy(shown) >= 0.9 * prompted
    assert ahoy(closed) == 0
    # closed means the base model, token for token at the same batch shape
    stayed = [q for q, a in zip(programming, closed) if not a.routed]
    assert [a.ids for a in ask(prism, smollm_tok, stayed)] == [
        a.ids for a in ask(net, smollm_tok, stayed)]
