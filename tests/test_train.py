"""train.py: the split, the gate, the distillation, and the whole command on the tiny model."""

import argparse
import json
import math
from pathlib import Path

import peft
import pytest
import torch
from conftest import Capture, Patch
from safetensors.torch import load_file
from sampling import Sampling
from support.messages import conversation
from tiny import one_thread, plain_log_p, randomize_adapter, tiny_llama
from tiny_run import (ALL_FILES, CHEMIST, DATA, PERSONAS, PIRATE, QUERIES, contents, error_of,
                      rows_of, run_train, timeless, verdict, write_rows)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from bench import saved_bytes
from bootstrap import Pair, hold_out, won_pairs
from gate import train_gate
from generate import gate_features, generate
from model import Sizes, Transformer, load
from prism import PRISM
from support.checkpoint import fingerprint
from support.hub import InputError
from support.probes import read_verdicts
from support.runs import FILES, STAGES, WITHIN, RunFolder
from tokenizer import Tokenizer
from train import (Sample, distill_samples, held_out_kl, learning_rate, micro_batches, sample_loss,
                   train_lora)


def settings(**changes: object) -> argparse.Namespace:
    """What train_lora reads from the command line."""
    return argparse.Namespace(**{"epochs": 2, "batch_size": 4, "lr": 1e-3, "kd_temperature": 1.0,
                                 "loss": "kl", "seed": 0} | changes)


def pairs_for(personas: dict[str, str], n: int = 6) -> list[Pair]:
    """Hand-made rows: n queries with random expert answers that end in the end of turn."""
    generator = torch.Generator().manual_seed(n)
    (name,), pairs = personas, []
    for i in range(n):
        ids = [*torch.randint(20, 2000, (8 + i,), generator=generator).tolist(), 2]
        pairs.append(Pair(name, i, f"What about the thing number {i}?", "b", "e", [7, 2],
                          ids, "eos", "eos"))
    return pairs


# --------------------------------------------------------------------------------------------------
# The split and the schedule


@pytest.mark.parametrize(("ones", "zeros", "expected"), [
    (25, 40, (5, 8)), (2, 2, (1, 1)), (1, 9, (0, 2)), (3, 0, (1, 0)), (0, 0, (0, 0))])
def test_hold_out_a_fifth_of_each_class(ones: int, zeros: int, expected: tuple[int, int]) -> None:
    """A class would lack held-out queries or others; or the split not be the seed's alone."""
    verdicts = [verdict(i, "expert" if i < ones else "tie") for i in range(ones + zeros)]
    held = hold_out(verdicts, 0)
    found = [verdicts[i].target for _, i in held]
    assert (found.count(1), found.count(0)) == expected
    assert hold_out(verdicts[::-1], 0) == held
    if ones == 25:
        assert hold_out(verdicts, 1) != held


def test_learning_rate() -> None:
    """The rate would not rise over 5% of the steps and fall in a line to zero after the last."""
    rates = [learning_rate(i, 100, 2.0) for i in range(101)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])
    assert rates[5:] == pytest.approx([2 - i * 2 / 95 for i in range(96)])
    assert learning_rate(0, 1, 2.0) == 2.0  # a single step is not wasted


def test_micro_batches() -> None:
    """A sample would be lost, a group exceed the budget, or the groups depend on the order."""
    samples = [Sample(f"p/{i}", [1] * n, 1, torch.zeros(0)) for i, n in enumerate(
        [7, 30, 7, 120, 12, 55, 1, 99, 30])]
    names = [[s.name for s in group] for group in micro_batches(samples, 100)]
    assert names == [["p/6", "p/0", "p/2", "p/4"], ["p/1", "p/8"], ["p/5"], ["p/7"], ["p/3"]]
    assert [[s.name for s in group] for group in micro_batches(samples[::-1], 100)] == names


# --------------------------------------------------------------------------------------------------
# Stage 5


@pytest.fixture(scope="module")
def samples(net: Transformer, tok: Tokenizer) -> list[Sample]:
    """Six won answers of the chemist and their teacher."""
    return distill_samples(net, tok, CHEMIST, pairs_for(CHEMIST), 1024)


@torch.no_grad()
def test_sample_loss_is_the_formula(net: Transformer, tok: Tokenizer) -> None:
    """It would not be KL(P(.|c, x, y_<t) || P(.|x, y_<t)) over all answer tokens, end included."""
    prism = PRISM(net, rank=4)  # B = 0: the student is the base model
    pairs = pairs_for(PIRATE, 4)
    samples = distill_samples(net, tok, PIRATE, pairs, 1024)
    expected = 0.0
    for pair, sample in zip(pairs, samples, strict=True):
        user = {"role": "user", "content": pair.query}
        bare, answer = tok.render([user]), pair.expert_ids
        persona = tok.render([{"role": "system", "content": PIRATE["pirate"]}, user])
        assert sample.ids == [*bare, *answer] and sample.start == len(bare)
        assert sample.answer_tokens == len(answer) == len(sample.teacher) and answer[-1] == 2
        log_p, log_q = ((net(torch.tensor([[*prompt, *answer]]))[0, len(prompt) - 1:-1]
                         / 2).double().log_softmax(-1) for prompt in (persona, bare))
        expected += 2**2 * float((log_p.exp() * (log_p - log_q)).sum())
    assert float(sample_loss(prism, samples, 2.0)) == pytest.approx(expected, rel=1e-4)
    assert held_out_kl(prism, []) is None


def test_sft_is_cross_entropy(net: Transformer, samples: list[Sample], monkeypatch: Patch) -> None:
    """--loss sft would have another value or gradient, in chunks of one token or of all."""
    prism = randomize_adapter(PRISM(net, rank=4))
    expected = 0.0
    for s in samples:
        log_p = plain_log_p(lambda ids: prism(ids, 1), s.ids[:s.start], s.ids[s.start:])
        expected = expected - log_p.sum()
    b = prism.adapter[1]["qkv_proj"].B[0]
    (gradient,) = torch.autograd.grad(expected, b)
    for chunk in (1, 2**20):
        monkeypatch.setattr("prism.KL_CHUNK_ELEMENTS", chunk * net.config.vocab_size)
        found = sample_loss(prism, samples, 1.0, loss="sft")
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
        torch.testing.assert_close(torch.autograd.grad(found, b)[0], gradient, rtol=1e-3, atol=1e-4)


def test_recomputed_layers_give_the_same_gradients(net: Transformer, samples: list[Sample],
                                                   monkeypatch: Patch) -> None:
    """Gradient checkpointing would draw another dropout mask, change a bit, or save no memory."""
    found, held = [], []
    for recompute in (False, True):
        monkeypatch.setattr(net, "sizes", Sizes(recompute=recompute))
        prism = randomize_adapter(PRISM(net, dropout=0.3))

        def loss() -> Tensor:
            return sample_loss(prism, samples, 1.0, torch.Generator().manual_seed(3))

        with one_thread():
            held.append(saved_bytes(loss, prism))
            value = loss()
            value.backward()
        found.append([value.detach(), *(p.grad for p in prism.adapter.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert held[1] < 0.7 * held[0]


def test_max_len_cuts_the_answer(net: Transformer, tok: Tokenizer) -> None:
    """The longer, teacher's sequence would not fit in max_len, or another part than the end go."""
    pairs = pairs_for(CHEMIST, 5)
    teachers = [len(tok.render(conversation(p.query, CHEMIST["chemist"]))) for p in pairs]
    full = distill_samples(net, tok, CHEMIST, pairs, max(teachers) + 100)
    assert [s.answer_tokens for s in full] == [len(p.expert_ids) for p in pairs]
    limit = max(teachers) + 3
    cut = distill_samples(net, tok, CHEMIST, pairs, limit)
    for sample, pair, teacher in zip(cut, pairs, teachers, strict=True):
        assert sample.answer_tokens == min(limit - teacher, len(pair.expert_ids))
        assert sample.ids[sample.start:] == pair.expert_ids[:sample.answer_tokens]
    assert distill_samples(net, tok, CHEMIST, pairs, min(teachers)) == []


def test_base_is_bit_equal_after_training(folder: Path, tok: Tokenizer, tmp_path: Path) -> None:
    """Training would change the base, or round small updates of the adapter away in bf16."""
    net = load(folder, dtype=torch.bfloat16)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    prism = PRISM(net, rank=4)
    a = prism.adapter[2]["down_proj"].A
    old = a.detach().clone()
    with one_thread(), RunFolder(tmp_path) as run:
        train_gate(prism.gate, gate_features(prism, tok, list(map(conversation, "abc")))[0],
                   torch.tensor([1.0, 0.0, 0.0]))
        samples = distill_samples(net, tok, CHEMIST, pairs_for(CHEMIST), 1024)
        train_lora(run, prism, samples, settings(lr=1e-5, epochs=1))
    moved = (a.detach() - old).abs()
    assert a.dtype == torch.float32
    assert 0 < float(moved.max()) < 1e-4 and float((moved > 0).float().mean()) > 0.9
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())


def test_last_good_state_is_kept(net: Transformer, samples: list[Sample], tmp_path: Path,
                                 monkeypatch: Patch) -> None:
    """A gradient that is infinite at step 3 would spoil step 2's checkpoint, or not be named."""
    monkeypatch.setattr(train, "CHECKPOINT_EVERY", 2)
    real, calls = train.sample_loss, []

    def faulty(*arguments: object) -> Tensor:
        loss = real(*arguments)
        calls.append(loss)
        # finite, with an infinite gradient
        return loss if len(calls) != 4 else loss + (loss - loss.detach()).sqrt()

    monkeypatch.setattr(train, "sample_loss", faulty)
    with (one_thread(), RunFolder(tmp_path) as run,
          pytest.raises(InputError, match=r"step 3: .*chemist/\d.*checkpoint is kept")):
        train_lora(run, PRISM(net, rank=2), samples, settings(epochs=3))
    assert int(load_file(tmp_path / "checkpoint.safetensors")["step"]) == 2
    assert [m["step"] for m in rows_of(tmp_path, "metrics.jsonl")] == [0, 1, 2]


def test_steps_are_adamw_on_the_kl(net: Transformer, samples: list[Sample], tmp_path: Path) -> None:
    """A step would be of another loss, norm, weight decay or rate than it is by hand."""
    mine, hand = PRISM(net, rank=4, dropout=0.0), PRISM(net, rank=4, dropout=0.0)
    with one_thread(), RunFolder(tmp_path) as run:
        train_lora(run, mine, samples, settings(epochs=3, batch_size=len(samples), lr=0.01))
        parameters = list(hand.adapter.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.01)
        norms = []
        for step in range(3):
            optimizer.param_groups[0]["lr"] = learning_rate(step, 3, 0.01)
            optimizer.zero_grad()
            (sample_loss(hand, samples, 1.0) / sum(s.answer_tokens for s in samples)).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
            optimizer.step()
        recorded = run.metrics()
    assert [m["gradient_norm"] for m in recorded] == pytest.approx(norms, rel=1e-3)
    assert max(norms) > 1  # or clipping was not tested
    for a, b in zip(mine.adapter.parameters(), parameters):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4)


# --------------------------------------------------------------------------------------------------
# The command


def stamps(out: Path, *names: str) -> list[int]:
    """When each file was last written."""
    return [(out / name).stat().st_mtime_ns for name in names]


def test_files_of_a_run(finished: Path, folder: Path) -> None:
    """A file would be missing or left over, or not say what made the run and its threshold; a chunk
    or a step would have no metrics row, or a wrong one. (The bill: test_report.py.)"""
    assert contents(finished).keys() == ALL_FILES
    run, adapter = (json.loads((finished / f"{name}.json").read_text())
                    for name in ("run", "prism"))
    expected = {"base_source": "folder", "base_fingerprint": fingerprint(folder), "gate_layer": 0,
                "queries": QUERIES, "gate_threshold": None, "personas": ["chemist", "pirate"],
                "dtype": "float32", "device": "cpu"}  # all: test_settings.py
    assert expected.items() <= run["settings"].items()
    assert run["versions"]["torch"] == torch.__version__

    answers, verdicts, held = read_verdicts(finished)
    metrics = rows_of(finished, "metrics.jsonl")
    by = {s: [m for m in metrics if m["stage"] == s] for s in (*STAGES, *WITHIN)}
    assert all(by.values()) and sum(map(len, by.values())) == len(metrics)
    assert adapter["threshold"] == by["gate"][0]["threshold"] and adapter["gate_layer"] == 0
    assert all(m["flops"] > 0 and m["seconds"] >= 0 for m in metrics)
    assert [m["prompts"] for m in by["answers"]] == [64, 4]  # chunks of 32 queries, two each
    assert [m["prompts"] for m in by["verdicts"]] == [256, 16]  # four readings an answer
    written = sum(len(pair.base_ids) + len(pair.expert_ids) for pair in answers)
    assert sum(m["tokens_written"] for m in by["answers"]) == written
    fit = sum(v.target for v in verdicts if (v.persona, v.index) not in held)
    steps = math.ceil(fit / 4) * 4
    assert [m["step"] for m in by["lora"]] == list(range(steps)) and steps > 8
    assert [m["lr"] for m in by["lora"]] == [learning_rate(i, steps, 1e-3) for i in range(steps)]
    assert all(math.isfinite(m["loss"]) and m["gradient_norm"] > 0 for m in by["lora"])
    assert sum(m["samples"] for m in by["lora"]) == 4 * fit


def test_reported_kl_is_what_transformers_and_peft_find(finished: Path, folder: Path) -> None:
    """The persona would not go into the adapter, or not as far as the run says."""
    pairs, verdicts, held = read_verdicts(finished)
    test = [p for p in won_pairs(pairs, verdicts) if (p.persona, p.index) in held]
    render = AutoTokenizer.from_pretrained(folder).apply_chat_template
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def log_p(pair: Pair, persona: bool) -> Tensor:
        system = [{"role": "system", "content": PERSONAS[pair.persona]}] if persona else []
        ids = render([*system, {"role": "user", "content": pair.query}],
                     add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *pair.expert_ids]])).logits[0, len(ids) - 1:-1]
        return logits.log_softmax(-1)

    teacher = [log_p(p, True) for p in test]
    base = [log_p(p, False) for p in test]
    model = peft.PeftModel.from_pretrained(model, finished).eval()
    student = [log_p(p, False) for p in test]

    def mean_kl(other: list[Tensor]) -> float:
        total = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(teacher, other))
        return total / sum(len(p) for p in teacher)

    kl = rows_of(finished, "metrics.jsonl")[-1]
    assert (kl["stage"], kl["held_out_samples"]) == ("kl", len(test)) and len(test) > 2
    assert kl["answer_tokens"] == sum(len(p.expert_ids) for p in test)
    assert kl["before"] == pytest.approx(mean_kl(base), rel=1e-3)
    assert kl["after"] == pytest.approx(mean_kl(student), rel=1e-3)
    assert kl["before"] > 0.2 and kl["after"] < 0.75 * kl["before"]


def test_a_flipped_verdict_takes_effect(out: Path, command: list[str], capfd: Capture) -> None:
    """A researcher could not overrule the judge. (Unasked it is refused: test_runs.py.)"""
    rows = rows_of(out, "verdicts.jsonl")
    won = sum(row["target"] for row in rows)
    lost = next(r for r in rows if r["winner"] == "base")
    lost |= {"winner": "expert", "target": 1}
    write_rows(out, "verdicts.jsonl", rows)
    before, data = contents(out), stamps(out, *DATA)
    assert run_train(*command, "--out", out, "--overwrite") == 0
    after = contents(out)
    assert stamps(out, *DATA) == data
    for name in ("gate.safetensors", "adapter_model.safetensors"):
        assert after[name] != before[name]
    assert rows_of(out, "metrics.jsonl")[-1]["prompts"] == won + 1
    assert f"distill / retain: {won + 1} / " in after["report.md"].decode()
    assert run_train(*command, "--out", out) == 0 and "complete" in capfd.readouterr().out


def test_no_answer_fits(out: Path, command: list[str], capfd: Capture) -> None:
    """A --max-len below every persona's length would be a traceback."""
    assert run_train(*command, "--out", out, "--from", "lora", "--max-len", 9) == 2
    assert "no answer fits in --max-len 9" in error_of(capfd)


def test_nothing_to_distil(finished: Path, out: Path, command: list[str], capsys: Capture) -> None:
    """Without a win the data would be lost, no reason be told, or an old adapter stay."""
    letter = [*command, "--judge", "letter", "--out", out]  # unparsed throughout on this model
    assert run_train(*letter, "--overwrite") == 3
    assert "nothing to distil" in capsys.readouterr().err
    found = contents(out)
    assert found.keys() == {"run.json", "metrics.jsonl", "traffic.jsonl", *DATA}
    assert found["answers.jsonl"] == contents(finished)["answers.jsonl"]
    verdicts = rows_of(out, "verdicts.jsonl")
    assert len(verdicts) == 2 * QUERIES and {v["winner"] for v in verdicts} == {"unparsed"}
    assert run_train(*letter) == 3
    assert contents(out) == found


def test_stage_by_stage(finished: Path, command: list[str], tmp_path: Path) -> None:
    """--stop-after would leave another stage's files, or end with others than a run in one go."""
    expected = {"run.json", "metrics.jsonl"}
    for stage in STAGES:
        assert run_train(*command, "--out", tmp_path, "--stop-after", stage) == 0
        expected |= {*FILES[stage]}
        unwritten = {"traffic.jsonl"} if stage in STAGES[:3] else set()  # stage 4 writes it
        assert stage == "lora" or contents(tmp_path).keys() == expected - unwritten
    assert timeless(tmp_path) == timeless(finished)


def test_gate_settings_reach_the_adapter(out: Path, command: list[str], net: Transformer,
                                         tok: Tokenizer) -> None:
    """A --gate flag would not reach prism.json and the routing, or stages 1-3 be done again."""
    before = stamps(out, *DATA)
    assert run_train(*command, "--out", out, "--overwrite", "--gate-layer", "1", "--gate-pool",
                     "last", "--gate-threshold", "0.25", "--epochs", "1") == 0
    assert stamps(out, *DATA) == before
    prism = PRISM.load(out, net)
    assert (prism.gate_layer, prism.gate_pool, prism.threshold) == (1, "last", 0.25)
    layers = json.loads((out / "adapter_config.json").read_text())["layers_to_transform"]
    assert layers == [2]
    [answer] = generate(prism, tok, [conversation("Hello there, you.")], Sampling(4, 0.0))
    assert answer.routed == (answer.gate >= 0.25)


def test_judge_model_judges(finished: Path, out: Path, command: list[str], tmp_path: Path) -> None:
    """Another model would not judge the same answers, or not be named with its fingerprint."""
    other = tiny_llama(tmp_path / "judge", seed=5)
    before = stamps(out, *DATA[:3])
    assert run_train(*command, "--out", out, "--overwrite", "--stop-after", "verdicts",
                     "--judge-model", other) == 0
    assert stamps(out, *DATA[:3]) == before
    mine, theirs = (rows_of(folder, "verdicts.jsonl") for folder in (finished, out))
    assert not any(a["evidence"] == b["evidence"] for a, b in zip(mine, theirs) if a["evidence"])
    [row] = [m for m in rows_of(out, "metrics.jsonl") if m["stage"] == "judge"]
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert row["model"] == str(other) and settings["judge_fingerprint"] == fingerprint(other)


def test_one_query_only(folder: Path, tmp_path: Path) -> None:
    """The smallest runs would end in NaN, or in neither an adapter nor status 3."""
    (tmp_path / "pirate.txt").write_text(PIRATE["pirate"])
    statuses = {}
    while set(statuses.values()) != {0, 3}:
        seed = len(statuses)
        out = tmp_path / str(seed)
        statuses[seed] = run_train(
            "--model", folder, "--personas", tmp_path, "--queries", 1, "--judge", "likelihood",
            "--max-new-tokens", 8, "--epochs", 1, "--seed", seed, "--out", out, "--rank", 2,
            "--dtype", "float32")
        assert statuses[seed] in (0, 3) and seed < 12
        assert "NaN" not in (out / "metrics.jsonl").read_text()
        for path in out.glob("*.safetensors"):
            assert all(bool(t.isfinite().all()) for t in load_file(path).values()), path
