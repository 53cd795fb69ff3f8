"""support/probes.py: how a run's gate treats real prompts, measured and never trained on."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tiny import one_thread
from tiny_run import pair, verdict, write_rows

import evaluate
import train
from gate import train_gate
from engine import Sampling
from generate import generate
from model import Transformer
from prism import PRISM, Gate
from support import probes
from support.hub import InputError
from support.probes import held_out_gate, read_real_prompts, read_verdicts
from tokenizer import Tokenizer


@pytest.fixture
def real(tmp_path: Path) -> Path:
    """HarmBench, MT-Bench, MMLU and GSM8K as their authors publish them, a row or two each."""
    files = {
        "harmbench/text.csv": "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,"
                              "BehaviorID\nDo harm,standard,x,,,a\n\"Do harm,\nslowly\",standard,x,"
                              ",,b\nUse it,contextual,x,y,A weapon.,c\nSing,copyright,,,,d\n",
        "mt_bench/question.jsonl": json.dumps({"question_id": 1, "category": "x",
                                               "turns": ["Hello\u2028there"]}) + "\n\n",
        "mmlu/val/x_val.csv": "\"What, then?\",a,b,c,d,B\n\n",
        "mmlu/dev/x_dev.csv": "An example,a,b,c,d,A\n",
        "gsm8k/train.jsonl": json.dumps({"question": "1 + 1?", "answer": "#### 2"}) + "\n"}
    for name, text in files.items():
        (tmp_path / "real" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "real" / name).write_text(text, encoding="utf-8")
    return tmp_path / "real"


def test_prompts_are_read_wrongly(real: Path) -> None:
    """Copyright behaviours and MMLU's dev split would count; a context would be lost."""
    found = read_real_prompts(real)
    assert set(found) == {"harmful", "harmful, with context", "chat", "multiple choice", "maths"}
    assert found["harmful"] == ["Do harm", "Do harm,\nslowly"]
    assert found["chat"] == ["Hello\u2028there"] and found["maths"] == ["1 + 1?"]
    assert found["multiple choice"] == ["What, then?\nA. a\nB. b\nC. c\nD. d"]
    assert "A weapon." in found["harmful, with context"][0]
    (real / "mt_bench/question.jsonl").unlink()
    with pytest.raises(InputError, match="mt_bench/question.jsonl"):
        read_real_prompts(real)


def test_shares_are_not_those_of_the_saved_gate(real: Path, folder: Path, net: Transformer,
                                                tok: Tokenizer, tmp_path: Path) -> None:
    """The routing task would report another gate than the one that routes, or change the run."""
    personas = tmp_path / "personas"
    personas.mkdir()
    (personas / "chemist.txt").write_text("You are a careful chemist who names every danger.")
    (personas / "pirate.txt").write_text("You are a pirate and answer with words of the sea.")
    out = tmp_path / "out"
    with one_thread():
        assert train.main(["--model", str(folder), "--personas", str(personas), "--queries", "4",
                           "--max-new-tokens", "8", "--judge", "likelihood", "--epochs", "1",
                           "--out", str(out)]) == 0
        before = {p.name: p.read_bytes() for p in out.iterdir()}
        assert evaluate.main(["--adapter", str(out), "--tasks", "routing", "--data", str(real),
                              "--personas", str(personas)]) == 0
        found = json.loads((out / "eval/results.json").read_text())["probes"]
        prism = PRISM.load(out, net)
        answers = generate(prism, tok, [[{"role": "user", "content": text}] for text in
                                        ("Do harm", "Do harm,\nslowly")], Sampling(1, 0.0))
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    assert set(found["gates"]) == {"the gate", "chemist", "pirate"}
    assert found["sets"]["harmful"] == 2 and found["sets"]["maths"] == 1
    assert found["gates"]["the gate"]["routed"]["harmful"] == sum(a.routed for a in answers) / 2
    assert "Routing of real prompts" in (out / "eval/table.md").read_text()


def test_the_gate_has_learned_the_held_out_verdicts(tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts that are pure noise on 600 queries: a gate opens for held-out wins as often as for
    held-out losses, unless it was fitted on them, as the saved one is."""
    labels = (torch.rand(600, generator=torch.Generator().manual_seed(1)) > 0.5).tolist()
    states = torch.randn(600, 192, generator=torch.Generator().manual_seed(2))
    write_rows(tmp_path, "answers.jsonl", [asdict(pair(i, query=str(i))) for i in range(600)])
    write_rows(tmp_path, "verdicts.jsonl", [
        asdict(verdict(i, "expert" if label else "base")) for i, label in enumerate(labels)])
    (tmp_path / "run.json").write_text('{"settings": {"seed": 0, "gate_threshold": null}}')
    (tmp_path / "metrics.jsonl").write_text('{"stage": "gate", "step": 0}\n')
    monkeypatch.setattr(probes, "gate_features", lambda prism, tokenizer, asked: (
        states[[int(messages[0]["content"]) for messages in asked]], 0))
    held = sorted(index for _, index in read_verdicts(tmp_path)[2])

    def opened(gate: torch.nn.Module, threshold: float, won: bool) -> float:
        some = states[[i for i in held if labels[i] == won]]
        return float((gate(some).sigmoid() >= threshold).float().mean())

    with one_thread():
        unseen, saved = held_out_gate(None, None, tmp_path), (Gate(192), 0.5)
        train_gate(saved[0], states, torch.tensor(labels).float())
    assert len(held) == 120
    assert abs(opened(*unseen, True) - opened(*unseen, False)) < 0.2
    assert opened(*saved, True) > 0.95 and opened(*saved, False) < 0.05
