"""README.md of an adapter folder: the model card that the Hugging Face hub expects, so that
`hf upload user/name FOLDER` publishes what `--adapter user/name` takes."""

from __future__ import annotations

from typing import Sequence

from support.adapter import read_settings
from support.hub import write_file
from support.report import number
from support.runs import RunFolder

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
