"""Reasoning models, stage by stage, on a tiny random one with DeepSeek-R1's chat format: a prompt
opens the think block, the history has no thoughts, and turns are marked by tokens that its
tokenizer does not call special. Qwen3's and SmolLM3's formats are its relatives."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Iterator
from unittest.mock import Mock

import pytest
import torch
from conftest import Folders, Patch, copy_folder, edit_json
from sampling import Sampling
from support.messages import conversation
from tiny import END_LOGIT, one_thread, tiny_llama
from tiny_run import rows_of, watch, write_files
from transformers import AutoTokenizer

import evaluate
import generate
import judge
import queries
from bootstrap import write_answers, write_verdicts
from evaluate import letter_tokens
from generate import sample_answers
from judge import INVERSE_PROMPTS, Comparison, LetterJudge, LikelihoodJudge
from model import Transformer, load
from prism import PRISM
from queries import OPENINGS, Query, measure_queries, write_queries
from support.runs import RunFolder
from tokenizer import Tokenizer
from train import distill_samples

MARKS = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
USER, ASSISTANT, THINK, END_THINK = range(3, 7)  # their ids, in place of SmolLM2's <repo_name> ...
R1 = ("{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}"
      "{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}{% endif %}"
      "{% if m.role == 'assistant' %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + "
      "eos_token }}{% endif %}{% endfor %}"
      "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}")
CLOSED = "<think>\n\n</think>\n\n"
EMPTY = "{{ '<think>\n\n</think>\n\n' }}"
QWEN3 = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
         "{% if m.role == 'assistant' and loop.last %}" + EMPTY + "{% endif %}"
         "{{ m.content.split('</think>')[-1].lstrip('\n') + '<|im_end|>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
         "{% if enable_thinking is defined and enable_thinking is false %}" + EMPTY
         + "{% endif %}{% endif %}")
SMOLLM3 = ("{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
           "{{ '<|im_start|>system\n' + ('/think' if enable_thinking else '/no_think') + "
           "'<|im_end|>\n' }}"
           "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
           "{% if m.role == 'assistant' and not enable_thinking %}{{ '<think>\n\n</think>\n' }}"
           "{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
           "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
           "{% if not enable_thinking %}{{ '<think>\n\n</think>\n' }}{% endif %}{% endif %}")
ASKED = conversation("Why?")
TALK = [*ASKED, {"role": "assistant", "content": "Hm, so.\n</think>\n\nBecause."},
        *conversation("Really?")]
TUTOR = "You are a patient tutor who explains each step of the way."


@pytest.fixture(scope="module", autouse=True)
def computed_on_one_thread() -> Iterator[None]:
    """Everything here is too small for more."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Folders) -> Path:
    """The tiny llama with R1's tokens and template; it likes to end its thoughts."""
    made = tiny_llama(tmp_path_factory.mktemp("r1"))

    def rename(settings: dict) -> None:
        for token, name in zip(settings["added_tokens"][USER:], MARKS):
            vocab = settings["model"]["vocab"]
            vocab[name] = vocab.pop(token["content"])
            token |= {"content": name, "special": False}

    edit_json(made / "tokenizer.json", rename)
    (made / "chat_template.jinja").write_text(R1)
    return made


@pytest.fixture(scope="module")
def net(folder: Path) -> Transformer:
    """The model, whose answers end their thoughts sooner or later."""
    made = load(folder, dtype=torch.float32)
    made.lm_head[END_THINK, 0] = END_LOGIT
    return made


def relative(folder: Path, template: str, target: Path) -> Tokenizer:
    """The tokenizer with another template, in a folder of its own."""
    copy_folder(folder, target)
    (target / "chat_template.jinja").write_text(template)
    return Tokenizer(target)


def prompts_of(watched: Mock) -> list[list[int]]:
    """The second argument of all calls: prompts, after a model."""
    return [list(ids) for call in watched.call_args_list for ids in call.args[1]]


@pytest.mark.parametrize("template", [R1, QWEN3, SMOLLM3], ids=["R1", "Qwen3", "SmolLM3"])
def test_prompts_of_each_family(template: str, folder: Path, tmp_path: Path) -> None:
    """Ids would not be transformers', or a letter not be read behind a closed, empty block."""
    tok = relative(folder, template, tmp_path / "x")
    theirs = AutoTokenizer.from_pretrained(tok.folder)
    for talk in (ASKED, TALK, [{"role": "system", "content": TUTOR}, *TALK]):
        for prompt in (True, False):
            assert tok.render(talk, prompt) == theirs.apply_chat_template(
                talk, add_generation_prompt=prompt, return_dict=False)
    if template != R1:
        assert tok.render(TALK, thinking=False) == theirs.apply_chat_template(
            TALK, add_generation_prompt=True, return_dict=False, enable_thinking=False)
    ids, mask = tok.render(ASKED, return_user_mask=True, thinking=False)
    assert tok.decode(ids).rstrip().endswith("<think>\n\n</think>")
    assert tok.decode([i for i, user in zip(ids, mask) if user]) == "Why?"
    assert [tok.decode([i]) for i in letter_tokens(tok, False)] == list("ABCDEFGHIJ")


def test_turn_marks_cannot_be_forged(tok: Tokenizer) -> None:
    """A turn's marks would not be control, or a think block's ends be: a judge has to see them."""
    ids = tok.render(conversation("".join(MARKS)))
    assert [ids.count(i) for i in (USER, ASSISTANT, THINK, END_THINK)] == [1, 1, 2, 1]
    assert set(tok.encode("".join(MARKS))) & {USER, ASSISTANT} == set()
    assert tok.decode([USER, THINK, END_THINK, ASSISTANT]) == "<think></think>"


def test_no_user_thinks(tok: Tokenizer, folder: Path, run: RunFolder, monkeypatch: Patch) -> None:
    """Stage 1: a user's turn would open a think block, or not end where the assistant's begins."""
    opened = tok.open_user_turn(TUTOR)
    assert opened[-1] == USER and not {THINK, END_THINK} & set(opened)
    assert tok.end_of_user_id == ASSISTANT and tok.end_of_turn_id == 2
    writer = load(folder, dtype=torch.float32)
    only = torch.full((writer.config.vocab_size,), -50.0).index_fill(0, torch.tensor(ASSISTANT), 0)
    monkeypatch.setattr(writer, "head", lambda x: only.expand(*x.shape[:-1], -1))
    write_queries(run, writer, tok, {"tutor": TUTOR}, 2, 0, "continue")
    rows = rows_of(run.path, "candidates.jsonl")
    assert all(row["complete"] and row["text"] in ("", *OPENINGS) for row in rows)


def test_answers_are_kept_judged_and_distilled_whole(net: Transformer, tok: Tokenizer,
                                                     run: RunFolder, monkeypatch: Patch) -> None:
    """Stages 2, 3 and 5: thoughts would be lost, or not begin in the open block of the prompt."""
    asked = [Query("tutor", i, f"How do I draw tree {n}?") for i, n in enumerate("abcdefgh")]
    answered = write_answers(run, net, tok, {"tutor": TUTOR}, asked, 48, 0)
    thought = [p for p in answered if END_THINK in p.base_ids and END_THINK in p.expert_ids]
    assert len(thought) > 1
    asked_of = LikelihoodJudge(net, tok)
    compare = watch(monkeypatch, asked_of, "compare")
    write_verdicts(run, asked_of, {"tutor": TUTOR}, thought)
    [compared] = compare.call_args.args
    assert [(c.expert, c.base) for c in compared] == [(p.expert, p.base) for p in thought]
    for pair, sample in zip(thought, distill_samples(net, tok, {"tutor": TUTOR}, thought, 1024)):
        ids = pair.expert_ids[:-1] if pair.expert_stop == "eos" else pair.expert_ids
        assert pair.expert == tok.decode(ids) and "</think>" in pair.expert
        student = tok.render(conversation(pair.query))
        teacher = tok.render(conversation(pair.query, TUTOR))
        assert sample.ids == [*student, *pair.expert_ids] and student[-2] == teacher[-2] == THINK
        hidden = net.hidden(torch.tensor([[*teacher, *pair.expert_ids]]))[0, len(teacher) - 1:-1]
        torch.testing.assert_close(sample.teacher, hidden)


def test_verdicts_behind_thoughts(net: Transformer, tok: Tokenizer, monkeypatch: Patch) -> None:
    """Stage 3: a letter or query would come within thoughts, or a judge not read whole answers."""
    asked = [Comparison("Why?", TUTOR, "Hm.</think>Because.", "Oh.</think>No.")]
    watched = watch(monkeypatch, judge, "hidden_states")
    LetterJudge(net, tok).compare(asked)
    one, other = map(tok.decode, prompts_of(watched))
    for said in (one, other):
        assert said.endswith(CLOSED)
        assert "Hm.</think>Because." in said and "Oh.</think>No." in said
    watched = watch(monkeypatch, judge, "token_log_probabilities")
    LikelihoodJudge(net, tok).compare(asked)
    said = [tok.decode(ids) for ids in prompts_of(watched)]
    ends = [text.endswith(CLOSED) for text in said]
    assert ends == ([True] * len(INVERSE_PROMPTS) + [False] * 2) * 2
    assert all(end or text.endswith("<think>\n") for text, end in zip(said, ends))


def test_given_words_are_no_thoughts(net: Transformer, tok: Tokenizer, monkeypatch: Patch) -> None:
    """A query that is identified, or words put in the assistant's mouth, would be thoughts."""
    watched = watch(monkeypatch, queries, "token_log_probabilities")
    measure_queries(net, tok, {"tutor": TUTOR}, [Query("tutor", 0, "Why?")], [])
    [ids] = prompts_of(watched)
    assert tok.decode(ids).endswith(CLOSED)
    request = watch(monkeypatch, generate, "Request")
    for lead in ("", "Sure"):
        sample_answers(net, tok, [ASKED], [0], Sampling(4), lead)
    assert [call.args[0] for call in request.call_args_list] == [
        tok.render(ASKED), tok.render(ASKED, thinking=False) + tok.encode("Sure")]


def test_what_follows_thoughts_is_the_answer(tok: Tokenizer, folder: Path, tmp_path: Path) -> None:
    """A block that was never closed would hold an answer, or a text without one be none."""
    said = {"a\n</think>\n\nb": "b", "<think>a</think>b</think>c": "c", "a": "", "": "",
            "<think>\na": "", "a</think>": ""}
    assert tok.opens_thinking and {text: tok.without_thoughts(text) for text in said} == said
    other = relative(folder, QWEN3, tmp_path / "x")
    said = {"a": "a", "<think>\na\n</think>\n\nb": "b", "\n<think>a": "",
            "The tag </think> ends": "The tag </think> ends"}
    assert not other.opens_thinking and {t: other.without_thoughts(t) for t in said} == said


def test_an_evaluation_sees_no_thoughts(folder: Path, tok: Tokenizer, tmp_path: Path,
                                        monkeypatch: Patch) -> None:
    """MMLU's question would be asked with the block open; a number in thoughts, ended or not, would
    count; or MT-Bench's later turns or judge would read a thought, finished or not."""
    told = {"gsm8k: base": ["It is 5?\n</think>\n\nIt is 4.", "It is 4."],
            "mt_bench: base": ["Hm.\n</think>\n\nFour.", "Uh, unfinished", "Eh</think>Six."],
            "mt_bench judge: replies": ["[[7]]"] * 3}
    data = write_files(tmp_path, {
        "mmlu/test/anatomy_test.csv": "2+2?,3,4,5,6,B\n",
        "gsm8k/test.jsonl": '{"question": "2+2?", "answer": "#### 4"}\n' * 2,
        "mt_bench/question.jsonl": json.dumps({"question_id": 1, "category": "math",
                                               "turns": ["2+2?", "And 3?", "So?"]}) + "\n"})
    prompts = defaultdict(list)

    def answers(weights, work, task, strategy, asked, *rest) -> list[dict]:
        label = f"{task}: {strategy}"
        first = len(prompts[label])
        prompts[label] += [tok.decode(ids) for ids, _ in asked]
        return [{"text": said, "stop": "eos"} for said in told[label][first:len(prompts[label])]]

    monkeypatch.setattr(evaluate.Weights, "answers", answers)
    read = watch(monkeypatch, evaluate, "hidden_states")
    assert evaluate.main(["--model", str(folder), "--data", str(data), "--tasks",
                          "mmlu,gsm8k,mt_bench", "--strategies", "base", "--out",
                          str(data / "out"), "--dtype", "float32", "--device", "cpu"]) == 0
    rows = defaultdict(list)
    for row in rows_of(data / "out", "items.jsonl"):
        rows[row["task"]].append(row)
    [ids], [row] = prompts_of(read), rows["mmlu"]
    assert ids == tok.render(conversation(row["prompt"]), thinking=False)
    assert [(r["output"], r["score"]) for r in rows["gsm8k"]] == [("It is 4.", 1.0), ("", 0.0)]
    assert [r["evidence"]["whole"] for r in rows["gsm8k"]] == told["gsm8k: base"]
    turns, judged = prompts["mt_bench: base"], prompts["mt_bench judge: replies"]
    assert [r["output"] for r in rows["mt_bench"]] == ["Four.", "", "Six."]
    assert rows["mt_bench"][0]["score"] == 7.0
    for text in (*turns, *judged):
        assert not any(word in text for word in ("Hm", "Uh", "Eh"))
    assert "Four." in turns[1] and all(text.endswith("<think>\n") for text in turns)
    assert len(judged) == 3 and all(text.endswith(CLOSED) for text in judged)


def test_chat_forgets_thoughts(net: Transformer, tok: Tokenizer, monkeypatch: Patch) -> None:
    """The chat would go on with more than the answer: with thoughts, or with unfinished ones."""
    said = iter(["Hm.\n</think>\n\nFour.", "Uh, unfinished", "x"])
    typed = iter(["2+2?", "And 3?", "So?", ""])
    talks = []

    def answer(model, tokenizer, conversations, *rest, **more) -> list[generate.Completion]:
        talks.append(tok.decode(tok.render(conversations[0])))
        return [generate.Completion(next(said), [], None, False, "eos", 1)]

    monkeypatch.setattr(generate, "generate", answer)
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert generate.chat(net, tok, Sampling(), "auto", None) == 0
    assert "Four." in talks[1] and "Hm" not in talks[1] and "Uh" not in talks[2]


def test_a_router_reads_the_open_block(net: Transformer, tok: Tokenizer) -> None:
    """The gate would read another prompt than is answered."""
    prism = PRISM(net, rank=2)
    ids, mask = tok.render(TALK, return_user_mask=True)
    assert ids[-2:] == [THINK, *tok.encode("\n")] and END_THINK not in ids
    assert tok.decode([i for i, m in zip(ids, mask) if m]) == "Really?"
    [answer] = generate.generate(prism, tok, [TALK], Sampling(4, 0.0))
    [p] = prism.gate_probability(torch.tensor([ids]), torch.tensor([len(ids)])).tolist()
    assert answer.prompt_tokens == len(ids) and answer.gate == pytest.approx(p, abs=1e-6)
