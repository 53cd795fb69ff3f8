"""What a finished run says about itself: what train.py prints, report.md, and its model card.

Everything is read from the files of the run folder, so nothing here can change a result. report.md
has the findings, their details by stage, the cost, and samples to read.
"""

import json
from collections import Counter
from typing import Sequence

from bootstrap import Pair, Verdict
from queries import OPENINGS, Query
from support.adapter import read_settings
from support.hub import write_file
from support.personas import CONTRAST
from support.rule import NOBODY, Rule
from support.runs import STAGES, WITHIN, RunFolder
from support.stats import interval

GATE_WORDS = {"verdict": "the verdicts", "intent": "the win rate of each query's persona (intent)"}


# A part of the report: its title, what was found (train.py prints that as well), and the details.
Section = tuple[str, list[str], list[str]]


def summarize(run: RunFolder) -> tuple[list[str], str]:
    """What was found, a line each, and the text of report.md, from the run folder's files alone."""
    settings, metrics, last = run.settings, run.metrics(), run.latest()
    queries = run.read("queries.jsonl", Query)
    pairs, verdicts = run.read("answers.jsonl", Pair), run.read("verdicts.jsonl", Verdict)
    kept = Counter(dict.fromkeys(settings["personas"], 0))
    kept.update(q.persona for q in queries)
    sections = [queries_section(last, settings["queries"], kept)]
    if "judge" in last:
        sections.append(judge_section(last["judge"]))
    if verdicts:
        sections.append(verdicts_section(verdicts, pairs))
    if "gate" in last:
        sections.append(gate_section(last["gate"]))
    if "kl" in last:
        sections.append(adapter_section(last["kl"]))
    sections += [cost_section(metrics), samples_section(queries, pairs, verdicts)]
    found, parts = [], []
    for title, lines, details in sections:
        found += lines
        if details:
            parts += [f"## {title}", *details]
    listed = "\n".join(f"- {line}" for line in found)
    return found, "\n\n".join([f"# PRISM run: {settings['model']}", listed, *parts]) + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    """A figure for people; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def share(hits: int, n: int) -> str:
    """A share with its 95% interval."""
    low, high = interval(hits, n)
    return f"{hits / n:.2f} [{low:.2f}, {high:.2f}]" if n else "-"


def cost_section(metrics: Sequence[dict]) -> Section:
    """What every stage cost, summed over its metrics rows."""
    def total(rows: Sequence[dict], name: str) -> float:
        return sum(m.get(name, 0) for m in rows)

    lines = []
    for stage in STAGES:
        rows = [m for m in metrics if WITHIN.get(m["stage"], m["stage"]) == stage]
        if rows:
            tokens = [total(rows, f"tokens_{name}") for name in ("read", "written", "trained")]
            seconds, peak = total(rows, "seconds"), max(m.get("peak_memory", 0) for m in rows)
            lines.append([stage, total(rows, "prompts"), *tokens, f"{seconds:.1f}",
                          round(sum(tokens) / seconds) if seconds else "-",
                          f"{total(rows, 'flops') / 1e12:.2f}", f"{peak / 2**30:.2f}"])
    minutes, flops = total(metrics, "seconds") / 60, total(metrics, "flops")
    header = ("stage", "prompts", "tokens read", "written", "trained", "seconds", "tokens/s",
              "TFLOP", "peak GiB so far")
    return "Cost", [f"cost: {minutes:.1f} min, {flops / 1e12:.2f} TFLOP"], [table(header, lines)]


WAYS = {"instruct": "the model was asked for a message to each expert, as in the paper",
        "continue": "the model went on as the user; where a context is in their language, half of "
                    f"the candidates were begun with its choice of {len(OPENINGS)} hand-written "
                    "openings"}


def queries_section(last: dict[str, dict], wanted: int, kept: Counter) -> Section:
    """What stage 1 delivered, and the trial of the ways to write queries."""
    if "quality" not in last:
        return "Queries", [f"{kept.total()} queries, not written by stage 1"], []
    q = last["quality"]
    found = [f"queries: {q['kept']} (wanted {wanted} for each of {len(kept)} personas); "
             "identifiable in words that stage 1 did not use: "
             f"{share(q['identifiable'], q['measured'])} (chance {q['chance']:.2f})"]
    short = [f"{name} {n}" for name, n in kept.items() if n < wanted]
    if short:
        found.append("fewer than wanted, the rest malformed, foreign or duplicates: "
                     + ", ".join(short))
    details = [f"Written in the style {q['style']}: {WAYS[q['style']]}.",
               f"Of {q['candidates']} candidates {q['complete']} were complete, "
               f"{q['well_formed']} well-formed, and {q['fits_its_persona']} clearly likeliest "
               "under their own persona."]
    if "style" in last:
        details += style_trial(last["style"])
    return "Queries", found, details


def style_trial(style: dict) -> list[str]:
    """The trial of the ways to write queries."""
    rows = []
    for name, t in style["styles"].items():
        n, distinct = t["candidates"], t["distinct"]
        rows.append([name, n, share(t["complete"], n), share(distinct, n), t["identifiable"],
                     share(t["identifiable"], distinct)])
    return ["The styles were tried first, and the one with most identifiable queries was taken. "
            "Complete: it ended by itself. Distinct: a query, and unlike those before. "
            "Identifiable: the model tells its expert from the others, in words that no style "
            f"uses (chance {style['chance']:.2f}).",
            table(("style", "candidates", "complete", "distinct", "identifiable", "of distinct"),
                  rows)]


def judge_section(judged: dict) -> Section:
    """The judge that was chosen, and the self-tests behind the choice."""
    title, chosen = "Self-verification", judged["chosen"]
    if chosen == NOBODY:
        return (title, [
            "judged by nobody (--judge none): every context's answer is distilled, but those of "
            f"contexts named {CONTRAST}..., which only teach the gate"], [])
    if chosen == Rule.name:
        return title, ["judged by a rule, not by the model"], []
    found, last = [f"judge: {chosen}"], judged["tests"][-1]
    if judged.get("model"):
        found[0] += f" of {judged['model']}: an outside judge, so this is not self-verification"
    if judged["forced"]:
        found.append("WARNING: this judge was forced with --judge, whatever its test says")
    if not last["trusted"]:
        found.append(f"WARNING: the {chosen} judge fails its own test; its verdicts mean little")
    if last["blind_to_refusals"]:
        found.append("WARNING: this judge is blind to refusals (it ranks compliance above refusal "
                     "on requests that should be refused); this run makes no claim about safety")
    rows = []
    for test in judged["tests"]:
        for kind, k in test["kinds"].items():
            rows.append([test["judge"], kind, k["pairs"], share(k["right"], k["pairs"]),
                         *(k[w] for w in ("wrong", "tie", "split", "unparsed")),
                         share(k["A"], k["letters"])])
    return (title, found, [
        "Known pairs: an answer of the run against the answer to another query, and a refusal "
        "against compliance where one should refuse. Right means that the judge preferred the "
        "better one under both orders (or wordings), split that these disagree. It is asked until "
        "a sequential test tells a judge that is right on 0.9 of the pairs from one that is right "
        "on 0.6.",
        table(("judge", "against", "pairs", "right", "wrong", "tie", "split", "unparsed",
               "share of A"), rows)])


def verdicts_section(verdicts: Sequence[Verdict], pairs: Sequence[Pair]) -> Section:
    """Who won, by persona: verdicts, mean answer lengths in tokens, and who won by length."""
    won = sum(v.target for v in verdicts)
    found = [f"distill / retain: {won} / {len(verdicts) - won} (queries the persona won, and all "
             "others)", *split_warnings(verdicts, pairs),
             *swap_lines(verdicts)]
    groups: dict[str, list[tuple[Verdict, Pair]]] = {}
    for v, p in zip(verdicts, pairs):
        groups.setdefault(v.persona, []).append((v, p))
    rows, unclear = [], []
    for name, some in [*groups.items(), ("**all**", list(zip(verdicts, pairs)))]:
        counts, n = Counter(v.winner for v, _ in some), len(some)
        longer, decided = longer_wins(*zip(*some))
        rows.append([name, n, *(counts[w] for w in ("expert", "base", "tie", "split", "unparsed")),
                     round(sum(len(p.base_ids) for _, p in some) / n),
                     round(sum(len(p.expert_ids) for _, p in some) / n),
                     share(counts["expert"], n), f"{longer} of {decided}"])
        # A sign test. Both judges are symmetric: two answers to one prompt would win equally often.
        low, _ = interval(counts["expert"], counts["expert"] + counts["base"])
        if name in groups and low <= 0.5:
            unclear.append(name)
    if unclear:
        found.append("wins cannot be told from losses (95%): " + ", ".join(unclear))
    return ("Verdicts", found, [
        "The run's own answers, with the persona (expert) against without (base); \"longer wins\": "
        "of the decided ones with unequal lengths.",
        table(("persona", "queries", "expert", "base", "tie", "split", "unparsed", "tokens base",
               "tokens expert", "expert wins", "longer wins"), rows)])


def swap_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """The same-prompt control of a rule, which is asked about both orders of two answers: two
    answers to ONE prompt would stand in either place equally often, so the places have to win
    equally often over all orders."""
    asked = [v.evidence for v in verdicts if v.judge == Rule.name]
    if not asked:
        return []
    places = Counter(side for both in asked for side in both)
    expert, base = places["expert"], places["base"]
    lines = [f"same-prompt control: over both orders of the {len(asked)} pairs the expert's place "
             f"won {expert} times and the base's {base} times"]
    low, high = interval(expert, expert + base)
    if not low <= 0.5 <= high:
        lines.append("WARNING: this rule prefers a place, whatever answer stands there, so two "
                     "answers to one prompt would not win equally often; let it compare the two "
                     "answers, or say --judge none if every answer is to be distilled")
    return lines


def longer_wins(verdicts: Sequence[Verdict], pairs: Sequence[Pair]) -> tuple[int, int]:
    """How many decided verdicts the longer answer (in tokens) won, and how many there are."""
    longer = [(len(p.expert_ids) > len(p.base_ids)) == (v.winner == "expert")
              for v, p in zip(verdicts, pairs)
              if v.winner in ("expert", "base") and len(p.expert_ids) != len(p.base_ids)]
    return sum(longer), len(longer)


def split_warnings(verdicts: Sequence[Verdict], pairs: Sequence[Pair]) -> list[str]:
    """What looks unhealthy about the split into distill and retain set."""
    chosen = Counter(v.persona for v in verdicts if v.target)
    distilled, n, warnings = sum(chosen.values()), len(verdicts), []
    judged = any(v.judge != NOBODY for v in verdicts)  # else there is nothing to be split
    if judged and not 0.05 <= distilled / n <= 0.95:
        warnings.append(f"WARNING: {distilled} of {n} queries go to the distill set; outside 5-95% "
                        "the gate has almost nothing to tell apart")
    name, most = chosen.most_common(1)[0] if chosen else ("", 0)
    if 2 * most > distilled and len({v.persona for v in verdicts}) > 1:
        warnings.append(f"WARNING: {name} alone gives {most} of {distilled} distill samples; the "
                        "adapter will be mostly that persona")
    won, decided = longer_wins(verdicts, pairs)
    if judged and won > 0.8 * decided:
        warnings.append(f"WARNING: the longer answer won {won} of {decided} decided verdicts; the "
                        "judge may reward length")
    return warnings


def gate_section(g: dict) -> Section:
    """The gate's out-of-fold figures."""
    low, high = g["auc_interval"]
    found = [f"gate: it learned {GATE_WORDS[g['target']]}; out of fold its AUC is "
             f"{number(g['auc'])} [{number(low)}, {number(high)}]; it opens for "
             f"{number(g['traffic_opened'], 2)} of {g['traffic']} messages of ordinary traffic"]
    if low is not None and low <= 0.5:
        found.append("WARNING: this AUC cannot be told from chance (0.5): the gate learned nothing "
                     "that holds on queries it has not seen; more --queries, or verdicts with less "
                     "noise")
    c = g["confusion"]
    losses = ", ".join(f"{kind} {loss:.3f}" for kind, loss in g["log_losses"].items())
    return ("Gate", found, [
        f"Log loss of held-out verdicts, calibrated, at most 0.693, by what the gate learned: "
        f"{losses}.",
        f"{g['folds']}-fold out of fold on {g['n']} messages, {g['queries']} of them queries, "
        f"threshold {g['threshold']:.3f}: accuracy {number(g['accuracy'])} (majority "
        f"{number(g['majority'])}).",
        table(("", "gate open", "gate closed"), [["persona won", c["true_open"],
              c["false_closed"]], ["it did not", c["false_open"], c["true_closed"]]])])


def adapter_section(k: dict) -> Section:
    """What reached the held-out queries, and what the adapter saves."""
    advice = []
    if k["before"] and k["after"] > 0.6 * k["before"]:
        advice = ["More queries help most here, then a higher --lr (watch the held-out KL)."]
    return ("Adapter", [
        f"adapter: forward KL to the persona teacher on {k['held_out_samples']} held-out queries, "
        f"nats per token: {number(k['before'], 4)} before, {number(k['after'], 4)} after (0 would "
        "be the persona's own distribution, read without the persona)",
        f"without the persona a prompt has {k['tokens_without']:.0f} instead of "
        f"{k['tokens_with']:.0f} tokens, and its first token comes after "
        f"{1e3 * k['seconds_without']:.0f} instead of {1e3 * k['seconds_with']:.0f} ms"], advice)


def samples_section(queries: Sequence[Query], pairs: Sequence[Pair],
                    verdicts: Sequence[Verdict]) -> Section:
    """Samples to read: three queries a persona, and the first two answers of each verdict."""
    parts = []
    for name in dict.fromkeys(q.persona for q in queries):
        some = [q.query for q in queries if q.persona == name][:3]
        parts.append(f"**{name}**: " + " / ".join(some))
    for winner in ("expert", "base", "split"):
        shown = [(v, p) for v, p in zip(verdicts, pairs) if v.winner == winner]
        for v, p in shown[:1]:
            parts += [f"### Verdict: {winner}", f"{p.persona}: {p.query}",
                      f"*base:* {quoted(p.base)}", f"*expert:* {quoted(p.expert)}",
                      f"evidence: `{json.dumps(v.evidence)}`"]
    return "Samples", [], parts


def quoted(text: str) -> str:
    """A text as one Markdown paragraph, cut to 600 characters."""
    line = " ".join(text.split())
    return line if len(line) <= 600 else line[:600] + " ..."


# README.md of an adapter folder, the model card that the Hugging Face hub expects, so that
# `hf upload user/name FOLDER` publishes what `--adapter user/name` takes.
CARD = """---
base_model: {base}
library_name: peft
tags:
- prism
- lora
- context-distillation
---

# PRISM adapter for {base}

A gated LoRA adapter for `{base}`, made by PRISM
([arXiv 2603.18507](https://arxiv.org/abs/2603.18507)).
The model wrote its own queries and answered them with and without these contexts: {contexts}.
The adapter learned from the answers that its context improved.
A small gate reads each query after layer {gate_layer} and decides whether the adapter answers.

| measured | value |
|---|---|
| queries, distilled ones among them | {queries}, {distilled} |
| judge | {judge} |
| forward KL to the model that reads the context, before and after | {before}, {after} |
| gate, out of fold, AUC with its 95% interval | {auc} [{low}, {high}] |
| share of ordinary traffic that opens the gate | {traffic} |
| prompt tokens of a query, with the context and with the adapter | {with_context}, {without} |

{warnings}

## Use

    python generate.py --adapter THIS_FOLDER_OR_NAME --prompt "..."

PEFT reads `adapter_model.safetensors` and `adapter_config.json` as a plain LoRA that is always on.
Behind a server that holds base and adapter, let the gate choose which of the two answers:

    from generate import router
    route = router("THIS_FOLDER_OR_NAME")
    model = "adapter" if route([{{"role": "user", "content": "..."}}]) else "base"

`report.md` has the whole run: verdicts by context, what it cost, samples to read.
"""


def write_card(run: RunFolder, findings: Sequence[str]) -> None:
    """Write README.md of a finished run from its files; the warnings are among its `findings`."""
    settings, last = read_settings(run.path), run.latest()
    gate, kl, confusion = last["gate"], last["kl"], last["gate"]["confusion"]
    low, high = gate["auc_interval"]
    warnings = [f"- {line}" for line in findings if line.startswith("WARNING")]
    write_file(run.path / "README.md", CARD.format(
        base=settings["base_model"], contexts=", ".join(run.settings["personas"]),
        gate_layer=settings["gate_layer"], queries=gate["queries"],
        distilled=confusion["true_open"] + confusion["false_closed"],
        judge=last["judge"]["chosen"], before=number(kl["before"], 4), after=number(kl["after"], 4),
        auc=number(gate["auc"]), low=number(low), high=number(high),
        traffic=number(gate["traffic_opened"], 2), with_context=round(kl["tokens_with"]),
        without=round(kl["tokens_without"]), warnings="\n".join(warnings)))
