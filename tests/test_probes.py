"""support/probes.py: how a run's gate treats real prompts, measured and never trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import one_thread

import evaluate
import train
from engine import Sampling
from generate import generate
from model import Transformer
from prism import PRISM
from support.hub import InputError
from support.probes import read_real_prompts
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
