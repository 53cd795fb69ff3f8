"""Answer conversations, routed through an adapter if there is one: `generate()`, and the command.
"""

import argparse
import itertools
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Sequence

import torch
from torch import Tensor

from engine import Engine, Output, Request
from model import Transformer, load
from prism import PRISM, Router, load_router
from sampling import Sampling, derive_seed
from support.adapter import read_settings
from support.device import choose_device, choose_dtype, pad
from support.distributed import progress_bar
from support.fields import read_fields
from support.hub import DEFAULT_MODEL, InputError, Parser, exit_status, resolve_adapter
from support.messages import conversation, read_prompts, with_system
from support.runs import cost_of, run_date, split_chunks
from tokenizer import Tokenizer

MOST_DIVERGENT = 8  # tokens that --explain lists: where adapter and base differ most


@dataclass(frozen=True)
class Completion:
    """One answer: its text without control tokens, its ids as sampled, gate probability, route
    (True: the adapter answered), stop reason ("eos" or "length") and the prompt's token count."""

    text: str
    ids: list[int]
    gate: float | None
    routed: bool
    stop: str
    prompt_tokens: int


def stop_tokens(net: Transformer, tokenizer: Tokenizer) -> set[int]:
    """Every id that ends a turn: generation_config.json's, config.json's and the template's."""
    settings = read_fields(tokenizer.folder / "generation_config.json")
    return {*net.config.eos_token_ids, *tokenizer.end_of_turn_ids,
            *settings.integers("eos_token_id", 0, 2**22)}


def sample_answers(net: Transformer, tokenizer: Tokenizer, conversations: Sequence[list[dict]],
                   seeds: Sequence[int], sampling: Sampling, lead: str = "",
                   bar: str | None = None) -> tuple[list[Completion], Counter[str]]:
    """The base model's answers to conversations, in order, each with its own seed, and what they
    cost. What comes before the first user text is read once for all that share it.

    Args:
        lead: words that the answer is made to begin with, after any think block; its text begins
            with them.
        bar: what a progress bar calls this work.
    """
    said = tokenizer.encode_turn("assistant", lead) if lead else []
    requests = []
    for messages, seed in zip(conversations, seeds):
        ids, shared = tokenizer.render_shared(messages, thinking=not lead)
        requests.append(Request([*ids, *said], seed, prefix=shared, begun=len(said)))
    return sample_requests(net, tokenizer, requests, sampling, stop_tokens(net, tokenizer), bar)


def sample_requests(net: Transformer, tokenizer: Tokenizer, requests: Sequence[Request],
                    sampling: Sampling, stops: set[int],
                    bar: str | None) -> tuple[list[Completion], Counter[str]]:
    """What the base model answers to requests, in their order, and what it cost."""
    engine = Engine(net, sampling, stops)
    answers = completions(tokenizer, engine.run(requests, bar=bar))
    return answers, cost_of(net, len(requests), engine.prompt_tokens, engine.new_tokens)


def completions(tokenizer: Tokenizer, outputs: Iterable[Output]) -> list[Completion]:
    """What the engine made of requests, in their order."""
    answers = []
    for out in sorted(outputs, key=lambda out: out.index):
        answers.append(Completion(tokenizer.decode(out.text_ids), out.ids, out.gate, out.routed,
                                  out.stop, len(out.request.ids)))
    return answers


def generate(model: Transformer | PRISM, tokenizer: Tokenizer, conversations: Iterable[list[dict]],
             sampling: Sampling | None = None, gate: str = "auto", batch_size: int = 16,
             on_token: Callable[[int, int], None] | None = None, progress: bool = False,
             first: int = 0) -> list[Completion]:
    """Answer conversations ([{"role", "content"}, ...] each), in input order.

    Args:
        model: a PRISM routes every conversation; a bare Transformer answers as the base.
        gate: "auto" lets the gate decide, "on" and "off" force the route.
        batch_size: slots of the engine.
        on_token: called with (conversation index, token id) as tokens appear.
        progress: show a bar.
        first: number of the first conversation; a conversation's draws depend on its number and the
            seed alone.
    """
    if sampling is None:
        sampling = Sampling()
    net, needs_mask = model, False
    if isinstance(model, PRISM):
        net = model.net
        needs_mask = model.gate_pool == "mean"
    requests = []
    for i, messages in enumerate(conversations, first):
        if needs_mask:
            ids, mask = tokenizer.render_with_user_mask(messages)
        else:
            ids, mask = tokenizer.render(messages), None
        requests.append(Request(ids, derive_seed(sampling.seed, i), user_mask=mask))
    engine = Engine(model, sampling, stop_tokens(net, tokenizer), batch_size, gate)
    bar = "answers" if progress else None
    return completions(tokenizer, engine.run(requests, on_token, bar))


def gate_inputs(gate_pool: str, tokenizer: Tokenizer, conversations: Sequence[list[dict]],
                device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a gate reads of conversations: right-padded ids [B, T], lengths [B] and, if it pools by
    "mean", the mask [B, T] of the last user texts."""
    if gate_pool == "last":
        return *pad(list(map(tokenizer.render, conversations)), device), None
    rows, masks = zip(*map(tokenizer.render_with_user_mask, conversations))
    return *pad(rows, device), pad(masks, device)[0].bool()


def gate_features(prism: Router, tokenizer: Tokenizer,
                  conversations: Sequence[list[dict]]) -> tuple[Tensor, int]:
    """h(x) [n, d] of each conversation, by the very function that routes at inference; and the
    tokens read."""
    parts = [torch.empty(0, prism.net.config.hidden_size, device=prism.net.device)]
    tokens = 0
    for some in progress_bar("reading the gate's layer", "batch", split_chunks(conversations)):
        ids, lengths, mask = gate_inputs(prism.gate_pool, tokenizer, some, prism.net.device)
        with torch.inference_mode():
            parts.append(prism.features(ids, lengths, mask))
        tokens += int(lengths.sum())
    return torch.cat(parts).clone(), tokens


def router(adapter: str | Path, device: str = "auto",
           dtype: str = "auto") -> Callable[[list[dict]], bool]:
    """`route(messages) -> bool`: whether a conversation should go to the adapter, for a server that
    has adapter and base loaded elsewhere. Only what the gate needs is loaded (prism.load_router).
    `adapter` is a folder, or a user/name on the hub."""
    where, adapter = choose_device(device), resolve_adapter(adapter)
    if read_settings(adapter)["gate_layer"] is None:
        return lambda messages: True  # trained elsewhere, without a gate: always on
    gate = load_router(adapter, where, choose_dtype(dtype, where))
    tokenizer = Tokenizer(gate.net.folder, run_date(adapter))

    def route(messages: list[dict]) -> bool:
        inputs = gate_inputs(gate.gate_pool, tokenizer, [messages], gate.net.device)
        return float(gate.gate_probability(*inputs)) >= gate.threshold

    return route


# --------------------------------------------------------------------------------------------------
# The command


def parser() -> argparse.ArgumentParser:
    """The command line of generate.py."""
    p = Parser(
        description="Answer prompts, routed through a PRISM adapter if one is given. Without "
        "--prompt or --prompts: an interactive chat. Exit status 0 done, 2 wrong input, "
        "130 interrupted.")
    what = p.add_argument_group("model")
    what.add_argument("--model",
                      help="model id or folder (default: the adapter's own base, "
                      f"else {DEFAULT_MODEL})")
    what.add_argument("--adapter", metavar="DIR|ID",
                      help="adapter folder written by train.py, or "
                      "the user/name of one on the hub; PEFT's have no gate and are always on")
    what.add_argument("--gate", choices=("auto", "on", "off"), default="auto",
                      help="auto: the gate decides per query (default); on/off: forced")
    what.add_argument("--device", default="auto",
                      help="auto (default), cpu, cuda, cuda:1, ...")
    what.add_argument("--dtype", default="auto",
                      help="auto (default), bfloat16, float32, float16")
    ask = p.add_argument_group("prompts")
    ask.add_argument("--system",
                     help="system message put before every prompt")
    ask.add_argument("--prompt", action="append", default=[],
                     help="a prompt; may be repeated")
    ask.add_argument("--prompts", type=Path, metavar="FILE.jsonl",
                     help='rows {"prompt": "..."} or {"messages": [{"role", "content"}, ...]}')
    ask.add_argument("--jsonl", action="store_true",
                     help="print one JSON row per prompt")
    ask.add_argument("--explain", action="store_true",
                     help="per prompt: the gate, both "
                     "answers, and where the adapter's distribution parts from the base's")
    draw = p.add_argument_group("sampling")
    draw.add_argument("--max-new-tokens", type=int, default=256,
                      help="default %(default)s")
    draw.add_argument("--temperature", type=float, default=0.7,
                      help="0 is greedy; default 0.7")
    draw.add_argument("--top-p", type=float, default=1.0,
                      help="nucleus; default 1 (off)")
    draw.add_argument("--top-k", type=int, default=0,
                      help="default 0 (off)")
    draw.add_argument("--seed", type=int, default=0,
                      help="default %(default)s")
    draw.add_argument("--batch-size", type=int, default=16,
                      help="slots; default %(default)s")
    return p


def load_model(model: str | None, adapter: str | None, device: str,
               dtype: str) -> tuple[Transformer | PRISM, Tokenizer]:
    """The base model, wrapped in a PRISM if an adapter is given, and its tokenizer."""
    where = choose_device(device)
    folder = None if adapter is None else resolve_adapter(adapter)
    if model is None:
        own = None if folder is None else read_settings(folder)["base_model"]
        model = own or DEFAULT_MODEL
    net = load(model, where, choose_dtype(dtype, where))
    tokenizer = Tokenizer(net.folder, run_date(folder))
    if folder is None:
        return net, tokenizer
    return PRISM.load(folder, net), tokenizer


def route_label(completion: Completion) -> str:
    """How a completion was routed, as the command prints it."""
    if completion.gate is None:
        return "[adapter]" if completion.routed else "[base]"
    return f"[gate {completion.gate:.2f} -> {'adapter' if completion.routed else 'base'}]"


def last_piece(tokenizer: Tokenizer, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    """What the text of ids gains by the last of them. A token alone may be half a character, which
    then comes with its other half."""
    before = tokenizer.decode(ids[:-1], skip_special_tokens).rstrip("\ufffd")
    whole = tokenizer.decode(ids, skip_special_tokens).rstrip("\ufffd")
    return whole[len(before):]


@torch.inference_mode()
def explain(prism: PRISM, tokenizer: Tokenizer, messages: list[dict], sampling: Sampling,
            number: int = 0) -> dict:
    """Answer conversation `number` by the base and by the adapter, whatever the gate says, and read
    the adapted answer with both.

    Returns:
        "gate", the texts "base" and "adapted", and the latter's "tokens", each with its "kl" in
        nats, KL( P_lora(.|x, y_<t) || P(.|x, y_<t) ): how far the two have parted there.
    """
    base, = generate(prism, tokenizer, [messages], sampling, "off", first=number)
    adapted, = generate(prism, tokenizer, [messages], sampling, "on", first=number)
    prompt = tokenizer.render(messages)
    ids = torch.tensor([[*prompt, *adapted.ids]], device=prism.net.device)

    def answer_logs(k: int) -> Tensor:
        """log P of the answer's tokens [n, V], the adapter on for k = 1."""
        states = prism.net.hidden(ids, prism.adapter, k)[0, len(prompt) - 1:-1]
        return prism.net.head(states).float().log_softmax(-1)

    with_lora, without = answer_logs(1), answer_logs(0)
    kl = (with_lora.exp() * (with_lora - without)).sum(-1).clamp(min=0).tolist()
    tokens = []
    for n in range(len(kl)):
        tokens.append(last_piece(tokenizer, adapted.ids[:n + 1], skip_special_tokens=False))
    return {"gate": base.gate, "base": base.text, "adapted": adapted.text, "tokens": tokens,
            "kl": kl}


def show_explanation(e: dict, threshold: float) -> str:
    """What `explain` returns for the terminal: the route, both answers, the widest gaps."""
    route = "no gate, so the adapter answers"
    if e["gate"] is not None:
        side = "adapter" if e["gate"] >= threshold else "base"
        route = f"gate {e['gate']:.2f}, threshold {threshold:.2f} -> {side}"
    kl, tokens = e["kl"], e["tokens"]
    widest = sorted(range(len(kl)), key=lambda i: -kl[i])[:MOST_DIVERGENT]
    gaps = []
    for i in widest:
        gaps.append(f"{kl[i]:.2f} at {i} {tokens[i]!r}")
    return (f"[{route}]\n\nbase:\n{e['base']}\n\nadapted:\n{''.join(tokens)}\n\n"
            f"KL(adapter || base): {sum(kl) / len(kl):.3f} nats a token; "
            f"widest {', '.join(gaps)}")


def chat(model: Transformer | PRISM, tokenizer: Tokenizer, sampling: Sampling, gate: str,
         system: str | None) -> int:
    """Talk in the terminal; every user turn re-reads the conversation and is routed anew."""
    messages = with_system([], system)
    print("chat: an empty line or Ctrl-D ends it", file=sys.stderr)
    for turn in itertools.count():
        try:
            text = input("> ")
        except EOFError:
            return 0
        if not text.strip():
            return 0
        messages += conversation(text)
        ids: list[int] = []

        def stream(_: int, token: int) -> None:
            ids.append(token)
            print(last_piece(tokenizer, ids), end="", flush=True)

        answer, = generate(model, tokenizer, [messages], sampling, gate, 1, stream, first=turn)
        print(f"\n{route_label(answer)}", flush=True)
        said = answer.text
        if not tokenizer.without_thoughts(said):
            # The template takes thoughts out, but cannot see where unfinished ones begin.
            said = ""
        messages.append({"role": "assistant", "content": said})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(lambda: _main(parser().parse_args(argv)))


def _main(args: argparse.Namespace) -> int:
    """Load, then chat, or answer all prompts and print them in input order."""
    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.top_k, args.seed)
    if args.batch_size < 1:
        raise InputError(f"--batch-size is {args.batch_size}, it must be at least 1")
    conversations = list(map(conversation, args.prompt))
    if args.prompts:
        conversations += read_prompts(args.prompts)
    conversations = [with_system(messages, args.system) for messages in conversations]
    if args.explain and not (conversations and args.adapter):
        raise InputError("--explain needs --adapter and a --prompt (or --prompts)")
    model, tokenizer = load_model(args.model, args.adapter, args.device, args.dtype)
    if not conversations:
        return chat(model, tokenizer, sampling, args.gate, args.system)

    def show(index: int, row: dict, text: str) -> None:
        if args.jsonl:
            print(json.dumps({"index": index} | row, ensure_ascii=False))
        else:
            print(text if index == 0 else f"\n{text}")

    if args.explain:
        for i, messages in enumerate(conversations):
            row = explain(model, tokenizer, messages, sampling, i)
            show(i, row, show_explanation(row, model.threshold))
        return 0
    progress = len(conversations) > 1 and sys.stderr.isatty()
    answers = generate(model, tokenizer, conversations, sampling, args.gate, args.batch_size,
                       progress=progress)
    for i, a in enumerate(answers):
        row = {"text": a.text, "gate": a.gate, "routed": a.routed,
               "prompt_tokens": a.prompt_tokens, "tokens": len(a.ids), "stop": a.stop}
        show(i, row, f"{route_label(a)} {a.text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
