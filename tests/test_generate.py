"""generate.py: generate(), router(), the command, the chat, --explain; on tiny random models."""

import io
import json
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import Capture, Folders, Patch, Tiny, copy_folder, edit_json
from sampling import Sampling, derive_seed
from support.messages import conversation, read_prompts
from tiny import VOCAB, halve, make_prism, one_thread, plain_loop, tiny_tokenizer

from engine import Engine, Output
from generate import (explain, gate_inputs, generate, main, router, show_explanation, stop_tokens)
from model import Transformer, load
from prism import PRISM, load_router
from support import hub
from support.hub import InputError
from tokenizer import Tokenizer

PROMPT_TEXTS = ["Hi!", "What is 2 + 2? Explain every step, please.", "为什么天空是蓝色的？",
                "Write a poem about the sea and the wind that comes from it.", "1, 2, 3, ...", "😀"]
TALKS = [conversation(text) for text in PROMPT_TEXTS]


@pytest.fixture(scope="module")
def adapter(net: Transformer, tok: Tokenizer, tmp_path_factory: Folders) -> Path:
    """A random adapter on disk; PROMPT_TEXTS route mixed."""
    prism, out = make_prism(net), tmp_path_factory.mktemp("adapter")
    halve(prism, [tok.render(talk) for talk in TALKS])
    prism.save(out)
    return out


# --------------------------------------------------------------------------------------------------
# generate()


def test_stop_tokens_are_the_union(folder: Path, tmp_path: Path) -> None:
    """An answer would run past an end of turn that a config or the template names."""
    copy = copy_folder(folder, tmp_path / "c")
    # 2 is <|im_end|>, which the template writes
    for config, generation, wanted in (([9, 8], [5, 7], {2, 5, 7, 8, 9}), (9, 5, {2, 5, 9}),
                                       (None, None, {2})):
        edit_json(copy / "config.json", lambda c: c.update(eos_token_id=config))
        edit_json(copy / "generation_config.json", lambda c: c.update(eos_token_id=generation))
        assert stop_tokens(load(copy), Tokenizer(copy)) == wanted
    (copy / "generation_config.json").unlink()
    assert stop_tokens(load(copy), Tokenizer(copy)) == {2}


def test_answers_in_input_order_drawn_by_number(net: Transformer, tok: Tokenizer) -> None:
    """An answer would stand elsewhere, show its end, or be drawn by more than seed and number."""
    sampling, stop = Sampling(max_new_tokens=16, temperature=1.0, seed=4), stop_tokens(net, tok)
    found = generate(net, tok, TALKS, sampling, batch_size=2)
    for i, (talk, completion) in enumerate(zip(TALKS, found, strict=True)):
        prompt, ids = tok.render(talk), completion.ids
        assert ids == plain_loop(net, prompt, sampling, stop, derive_seed(4, i))
        assert completion.stop == ("eos" if ids[-1] in stop else "length")
        assert completion.text == tok.decode(ids[:-1] if ids[-1] in stop else ids)
        assert completion.prompt_tokens == len(prompt)
        assert completion.gate is None and completion.routed is False
    assert {completion.stop for completion in found} == {"eos", "length"}
    assert generate(net, tok, TALKS, sampling, batch_size=16) == found
    assert generate(net, tok, [], sampling) == []


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("tied", [True, False])
def test_router_decides_like_the_whole_model(pool: str, tied: bool, tmp_path: Path,
                                             tiny_checkpoint: Tiny) -> None:
    """generate() or a server would route by another probability, load more, or take any base; or a
    gate behind the base's last layer be a traceback, or read another layer."""
    folder = tiny_checkpoint("qwen2", vocab_size=VOCAB, tie_word_embeddings=tied)
    tiny_tokenizer(folder)
    net = load(folder, dtype=torch.float32)
    tok, prism = Tokenizer(net.folder), make_prism(net, pool, gate_layer=1)
    found = [c.gate for c in generate(prism, tok, TALKS, Sampling(1), batch_size=4)]
    prism.threshold = sum(sorted(found)[2:4]) / 2
    wanted = [p >= prism.threshold for p in found]
    assert [c.routed for c in generate(prism, tok, TALKS, Sampling(1), batch_size=4)] == wanted
    prism.save(tmp_path)
    route, gate = router(tmp_path, "cpu", "float32"), load_router(tmp_path, dtype=torch.float32)
    assert [route(talk) for talk in TALKS] == wanted
    inputs = gate_inputs(pool, tok, TALKS, torch.device("cpu"))
    assert gate.gate_probability(*inputs).tolist() == pytest.approx(found, abs=1e-5)
    assert len(gate.net.layers) == 2 and gate.net.lm_head is gate.net.embed_tokens
    edit_json(tmp_path / "prism.json", lambda p: p.update(base_fingerprint="0" * 64))
    with pytest.raises(InputError, match="weights differ"):
        router(tmp_path, "cpu", "float32")
    edit_json(tmp_path / "prism.json", lambda p: p.update(gate_layer=7))
    with pytest.raises(InputError, match="layers, not the 8 asked for"):
        router(tmp_path, "cpu", "float32")
    edit_json(tmp_path / "prism.json",
              lambda p: p.update(gate_layer=None, gate_pool=None, threshold=None))
    with pytest.raises(InputError, match="does not name a gate"):
        load_router(tmp_path)


# --------------------------------------------------------------------------------------------------
# The command


def command(*arguments: object) -> int:
    """Run `python generate.py ...` in this process: greedy, fp32, few tokens; later flags win."""
    return main(["--dtype", "float32", "--device", "cpu", "--temperature", "0",
                 "--max-new-tokens", "6", *map(str, arguments)])


def rows_of(capsys: Capture) -> list[dict]:
    """The rows that --jsonl has printed."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("gate", ["auto", "on", "off"])
def test_jsonl_rows_are_the_interface(gate: str, net: Transformer, tok: Tokenizer, adapter: Path,
                                      tmp_path: Path, capsys: Capture) -> None:
    """--jsonl would have other fields, order or routes; or a file with BOM and CRLF be refused."""
    talk = conversation(f"{PROMPT_TEXTS[4]}\u2028", "Be brief.")
    rows = [{"prompt": PROMPT_TEXTS[2]}, {"prompt": PROMPT_TEXTS[3]}, {"messages": talk}]
    lines = [json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows]
    path = tmp_path / "prompts.jsonl"
    path.write_bytes("".join(["\ufeff", *lines, "\r\n"]).encode())
    assert command("--adapter", adapter, "--prompt", PROMPT_TEXTS[0], "--prompt", PROMPT_TEXTS[1],
                   "--prompts", path, "--gate", gate, "--jsonl", "--batch-size", 2) == 0
    found, prism, talks = rows_of(capsys), PRISM.load(adapter, net), [*TALKS[:4], talk]
    wanted = generate(prism, tok, talks, Sampling(6, 0.0), gate)
    for i, (row, completion) in enumerate(zip(found, wanted, strict=True)):
        assert list(row) == ["index", "text", "gate", "routed", "prompt_tokens", "tokens", "stop"]
        assert row["index"] == i and row["text"] == completion.text
        assert row["gate"] == pytest.approx(completion.gate, abs=1e-5)
        assert row["routed"] is completion.routed
        assert row["prompt_tokens"] == len(tok.render(talks[i]))
        assert row["tokens"] == len(completion.ids) and row["stop"] in ("eos", "length")
    assert {row["routed"] for row in found} == {"auto": {True, False}, "on": {True},
                                                "off": {False}}[gate]
    assert command("--adapter", adapter, "--prompt", PROMPT_TEXTS[0], "--gate", gate) == 0
    side = "adapter" if found[0]["routed"] else "base"
    label = f"[gate {found[0]['gate']:.2f} -> {side}]"
    assert capsys.readouterr().out == f"{label} {found[0]['text']}\n"


def test_system_message_before_every_prompt(folder: Path, net: Transformer, tok: Tokenizer,
                                            tmp_path: Path, capsys: Capture) -> None:
    """--system would be left out, or come before a system message that a prompt has itself."""
    path, own = tmp_path / "p.jsonl", conversation("Hi!", "You are a cat.")
    path.write_text(json.dumps({"messages": own}) + "\n", encoding="utf-8")
    assert command("--model", folder, "--system", "You are a dog.", "--prompt", "Hi!",
                   "--prompts", path, "--jsonl") == 0
    rows, talks = rows_of(capsys), [conversation("Hi!", "You are a dog."), own, TALKS[0]]
    wanted = [c.text for c in generate(net, tok, talks, Sampling(6, 0.0))]
    assert [row["text"] for row in rows] == wanted[:2] and len(set(wanted)) == 3
    assert all(row["gate"] is None and row["routed"] is False for row in rows)


@pytest.mark.parametrize("line", [
    '{"prompt": "unfinished', '["prompt"]', "5", '{"question": "x"}', '{"prompt": 5}',
    '{"messages": "hi"}',  # other conversations that are none: test_tokenizer.py
    '{"messages": [{"role": "user", "role": "system", "content": "x"}]}'])
def test_broken_prompts_are_named(line: str, folder: Path, tmp_path: Path, capsys: Capture) -> None:
    """A broken line would be a traceback, have no number, or let others be answered first."""
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + '\n{"prompt": "fine"}\n', encoding="utf-8")
    assert command("--model", folder, "--prompts", path, "--system", "Be brief.") == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith(f"error: {path}, line 3: ") and error.count("\n") == 1


def test_a_file_of_prompts_may_be_large(tmp_path: Path, monkeypatch: Patch) -> None:
    """The limit on a checkpoint's files would refuse somebody's hundred thousand prompts."""
    monkeypatch.setattr(hub, "MOST_BYTES", 9)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi!"}\n')
    assert read_prompts(tmp_path / "prompts.jsonl") == [conversation("Hi!")]


@pytest.mark.slow
def test_two_thousand_prompts(net: Transformer, tok: Tokenizer, tmp_path: Path, monkeypatch: Patch,
                              capsys: Capture) -> None:
    """Under load a prompt would be lost or answered twice, or memory would grow."""
    status, prompts, memory = Path("/proc/self/status"), 2000, []
    if not status.exists():
        pytest.skip("no /proc to read the resident memory from")

    class Metered(Engine):
        def _collect(self) -> list[Output]:
            finished = super()._collect()
            resident = int(re.search(r"VmRSS:\s*(\d+) kB", status.read_text())[1])
            memory.extend([resident] * len(finished))
            return finished

    draw, path, prism = random.Random(0), tmp_path / "prompts.jsonl", make_prism(net)
    words = " ".join(PROMPT_TEXTS).split()
    texts = [" ".join(draw.choices(words, k=int(2**draw.uniform(0, 7)))) for _ in range(prompts)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    halve(prism, [tok.render(conversation(text)) for text in texts[:200]])
    prism.save(tmp_path)
    monkeypatch.setattr("generate.Engine", Metered)
    with one_thread():
        assert command("--adapter", tmp_path, "--prompts", path, "--jsonl",
                       "--max-new-tokens", 24) == 0
    rows = rows_of(capsys)
    assert [row["index"] for row in rows] == list(range(prompts)) and len(memory) == prompts
    assert 0.3 * prompts < sum(row["routed"] for row in rows) < 0.7 * prompts
    quarter = prompts // 4
    first, last = (sorted(part)[quarter // 2] for part in (memory[:quarter], memory[-quarter:]))
    # Measured: 1.2 MiB of answers that wait to be printed; a forgotten cache row a prompt: 58.
    assert last - first < 2**12, f"{first} KiB in the first quarter, {last} KiB in the last"


# --------------------------------------------------------------------------------------------------
# The chat


def talk_to(monkeypatch: Patch, typed: str, *arguments: object) -> list[str]:
    """Chat through the command with `typed` on stdin; what it wrote to stdout, piece by piece."""
    pieces: list[str] = []
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", SimpleNamespace(write=pieces.append, flush=lambda: None))
        assert command(*arguments) == 0
    return pieces


def test_chat_streams_and_routes_every_turn(net: Transformer, tok: Tokenizer, tmp_path: Path,
                                            monkeypatch: Patch) -> None:
    """A turn would not stream, or not be routed anew on the whole talk, here to the other side."""
    prism = make_prism(net)
    # A threshold between the two turns' probabilities, whichever side the first turn is on.
    for gates in (("on", "off"), ("off", "on")):
        talk, turns = [], []
        for gate in gates:
            talk += conversation("Hi!")
            turns += generate(prism, tok, [talk], Sampling(6, 0.0), gate)
            talk.append({"role": "assistant", "content": turns[-1].text})
        if (turns[0].gate > turns[1].gate) is (gates[0] == "on"):
            break
    else:
        pytest.fail("this random gate does not tell the two turns apart")
    prism.threshold = (turns[0].gate + turns[1].gate) / 2
    prism.save(tmp_path)
    pieces = talk_to(monkeypatch, "Hi!\nHi!\n\n", "--adapter", tmp_path)
    route = {"on": "adapter", "off": "base"}
    one, two = (f"{turn.text}\n[gate {turn.gate:.2f} -> {route[gate]}]\n"
                for turn, gate in zip(turns, gates))
    assert "".join(pieces) == f"> {one}> {two}> "
    first = next(i for i, piece in enumerate(pieces) if "[gate" in piece)
    assert sum(bool(piece.strip(" >")) for piece in pieces[:first]) >= 4


def test_chat_without_adapter(folder: Path, net: Transformer, tok: Tokenizer, capsys: Capture,
                              monkeypatch: Patch) -> None:
    """Without an adapter a chat would fail, forget --system, repeat its draws, or never end."""
    pieces = talk_to(monkeypatch, "Hi!\nHi!", "--model", folder, "--system", "Be brief.",
                     "--temperature", 1, "--seed", 8)
    talk, wanted = conversation("Hi!", "Be brief."), ""
    for turn in range(2):
        [answer] = generate(net, tok, [talk], Sampling(6, 1.0, seed=8), first=turn)
        wanted += f"> {answer.text}\n[base]\n"
        talk += [{"role": "assistant", "content": answer.text}, *conversation("Hi!")]
    assert "".join(pieces) == f"{wanted}> "
    assert "Ctrl-D" in capsys.readouterr().err


def test_interrupted_chat_is_status_130(folder: Path, monkeypatch: Patch, capsys: Capture) -> None:
    """Ctrl-C would be a traceback, or count as done."""
    def interrupted(_: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert command("--model", folder) == 130
    assert "Traceback" not in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# --explain


def test_explanation_is_of_the_plain_answers(adapter: Path, net: Transformer, tok: Tokenizer,
                                             capsys: Capture) -> None:
    """--explain would show other answers than without it, or not the KL of their full logits."""
    flags = ["--adapter", adapter, *["--prompt", "Why?"] * 3, "--max-new-tokens", 12,
             "--temperature", 1.5, "--seed", 3, "--batch-size", 1, "--jsonl"]
    assert command(*flags, "--explain") == 0
    explained = rows_of(capsys)
    for gate, side in (("off", "base"), ("on", "adapted")):
        assert command(*flags, "--gate", gate) == 0
        plain = [row["text"] for row in rows_of(capsys)]
        assert plain == [row[side] for row in explained]
        assert len(set(plain)) == 3  # one question, three positions

    prism, talk = PRISM.load(adapter, net), conversation("Why?")
    sampling = Sampling(12, 1.5, seed=3)
    e, answer = explain(prism, tok, talk, sampling), generate(prism, tok, [talk], sampling, "on")[0]
    prompt = tok.render(talk)
    ids = torch.tensor([[*prompt, *answer.ids]])
    with torch.no_grad():
        p, q = (prism(ids, k)[0, len(prompt) - 1:-1].double().log_softmax(-1) for k in (1, 0))
    assert e["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), rel=1e-3, abs=1e-6)
    assert max(e["kl"]) > 1e-3 and len(e["tokens"]) == len(e["kl"])
    assert "".join(e["tokens"]).startswith(e["adapted"]) and e["adapted"] == answer.text
    assert explained[0] == {"index": 0} | e | {"kl": pytest.approx(e["kl"], abs=1e-5)}
    shown = show_explanation(e, 0.5)
    assert f"gate {e['gate']:.2f}" in shown and f"{max(e['kl']):.2f} at" in shown
