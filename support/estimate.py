"""What a run takes: how much memory (`--dry-run`), so how much may run at once, and how long.

The time is that of its FLOPs, known from the settings, at this machine's speed, measured in two
seconds.
"""

import argparse
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Callable

import torch

from model import KVCache, Sizes, Transformer
from prism import KL_CHUNK_ELEMENTS, PRISM
from queries import Query
from support.config import Config, cache_bytes, kept_tokens
from support.device import choose_dtype
from support.distributed import world_size
from support.hub import read_json, resolve
from support.report import table
from support.rule import asks_no_model
from support.runs import CHUNK, RunFolder
from support.settings import GATE_DEPTH

PLAN_PROMPT = 512  # tokens of persona and query that are planned for, at least
QUERY_ROOM = 128  # of these, of a query
PLAN_ROW = 1024  # tokens of a training row it plans for: the default --max-len
# What a GPU may do at once, if there is room: the best first. The paper's sixteen rows of a
# training step are 16,384 tokens; more would be for nothing.
# Each is planned by its own stage alone, so that a setting of stage 5 does not change stage 1.
ON_GPU = {"recompute": ("5 adapter", (False,)), "slots": ("1-2 answers", (256, 128, 64)),
          "score_tokens": ("3 verdicts", (16384, 8192)), "score_logits": ("3 verdicts", (2**26,)),
          "train_tokens": ("5 adapter", (16384, 8192))}
DRIVER = 2**30  # bytes that are left to a GPU's driver
USED = 0.9  # share of the rest that may be planned for more than CPUs do at once
RECOMPUTE_ABOVE = 4 * 2**30  # bytes of activations from which a CPU computes layers twice instead


def activation_bytes(config: Config, tokens: int, rank: int) -> int:
    """At most what `tokens` leave behind for the backward pass, if every layer is adapted.

    In the model's dtype: the inputs of the projections (of `down_proj` its two halves), queries and
    keys, the whole qkv they came from, and LoRA's h with its dropout mask. In fp32: what goes into
    each norm, also those of queries and keys, two factors a norm and attention's normalisers. Where
    scores are capped, these too (no kernel computes them again), in rows of PLAN_ROW tokens.
    """
    size, heads, kv_heads = config.dtype.itemsize, config.num_heads, config.num_kv_heads
    q, kv = heads * config.head_dim, kv_heads * config.head_dim
    norms = len(config.family.norms)
    per_layer = size * (2 * config.hidden_size + 2 * config.intermediate_size + 3 * (q + kv)
                        + 14 * rank)  # p * rank wide for p = 3, 1, 2, 1 stacked ones; h and mask
    per_layer += 4 * (norms * (config.hidden_size + 2) + heads)
    if config.family.qk_norm:
        per_layer += 4 * (q + kv + 2 * (heads + kv_heads))
    if config.attention_cap is not None:  # fp32 after tanh and after softmax, and rounded
        per_layer += heads * PLAN_ROW * (8 + size)
    return tokens * config.num_layers * per_layer


def unloaded(config: Config, args: argparse.Namespace) -> PRISM:
    """What a run with these settings trains, by its shapes: nothing is loaded."""
    with torch.device("meta"):
        net = Transformer(config)
    gate_layer = config.num_layers // GATE_DEPTH if args.gate_layer is None else args.gate_layer
    return PRISM(net, args.rank, args.alpha, gate_layer)


def memory_plan(prism: PRISM, new_tokens: int, sizes: Sizes,
                context: int = 0) -> dict[str, dict[str, int]]:
    """Stage -> part -> bytes on the device."""
    config, prompt = prism.net.config, max(PLAN_PROMPT, context + QUERY_ROOM)
    size, d, wide = config.dtype.itemsize, config.hidden_size, config.intermediate_size
    weights = size * sum(p.numel() for p in prism.net.parameters())
    trained = sum(p.numel() for p in prism.adapter.parameters())
    token = cache_bytes(config, config.dtype)
    held = max(kept_tokens(config, config.dtype), sizes.score_tokens)  # one call may need more
    reading = 4 * (d + wide) * size  # what one layer holds of a token while it computes
    if config.attention_cap is not None:  # its scores, three times in fp32
        reading += config.num_heads * prompt * 12
    activations = activation_bytes(config, sizes.train_tokens, prism.rank)
    if sizes.recompute:  # every layer's input, and all of one layer
        activations = (config.num_layers * sizes.train_tokens * d * size
                       + activations // config.num_layers)
    logits = 3 * 4 * config.vocab_size  # fp32 logits of a row, probabilities, running sums
    return {
        "1-2 answers": {"weights": weights,
                        "KV slots": sizes.slots * (prompt + new_tokens) * token,
                        "reading prompts": sizes.slots * prompt * (reading + token),
                        "shared beginnings": held * token,
                        "sampling": sizes.slots * logits},
        "3 verdicts": {"weights": weights,
                       "scoring batch": sizes.score_tokens * (reading + 3 * token),
                       "shared beginnings": held * token, "logits": 3 * 4 * sizes.score_logits},
        "4 gate": {"weights": weights, "reading prompts": CHUNK * prompt * reading},
        # fp32 master, gradient and two moments, and the cast copy
        "5 adapter": {"weights": weights, "LoRA and optimizer": trained * (16 + size),
                      "activations": activations,
                      "a layer's gradients": sizes.train_tokens * 5 * wide * size,
                      "loss chunk": KL_CHUNK_ELEMENTS * (3 * 4 + 2 * size)}}  # on a GPU


def fits(plan: dict[str, int], size: float) -> bool:
    """Whether a stage's plan fits on a GPU of `size` bytes."""
    return sum(plan.values()) <= size - DRIVER


def choose_sizes(prism: PRISM, args: argparse.Namespace, size: float | None,
                 context: int = 0) -> Sizes:
    """What runs at once: one set for CPUs (`size` is None); on a GPU of `size` bytes, or of
    --gpu-memory, of each the most that its plan has room for, with contexts of up to `context`
    tokens. --slots is heeded."""
    activations = activation_bytes(prism.net.config, Sizes.train_tokens, prism.rank)
    sizes = Sizes(args.slots or Sizes.slots, recompute=activations > RECOMPUTE_ABOVE)
    if size is None:
        return sizes
    size = args.gpu_memory * 2**30 if args.gpu_memory else size
    for name, (stage, values) in ON_GPU.items():
        if name == "slots" and args.slots:
            continue
        for value in values:
            larger = replace(sizes, **{name: value})
            plan = memory_plan(prism, args.max_new_tokens, larger, context)
            if fits(plan[stage], USED * size):
                sizes = larger
                break
    return sizes


def dry_run(args: argparse.Namespace) -> int:
    """Print the memory plan for --model (an id, a folder, or a config.json)."""
    path = Path(args.model)
    if path.suffix != ".json":
        path = resolve(args.model, ["config.json"]) / "config.json"
    config = Config.from_json(read_json(path), str(path))
    config.dtype = choose_dtype("bfloat16" if args.dtype == "auto" else args.dtype,
                                torch.device("cpu"))
    prism = unloaded(config, args)
    rows = []
    for card in [args.gpu_memory] if args.gpu_memory else [24, 40, 80]:
        sizes = choose_sizes(prism, args, card * 2**30)
        plan = memory_plan(prism, args.max_new_tokens, sizes)
        parts = list(dict.fromkeys(part for stage in plan.values() for part in stage))
        print(f"{path}, a GPU of {card:g} GB, GiB:\n")
        print(table(("stage", *parts, "sum"), [
            [name, *(f"{stage[p] / 2**30:.2f}" if p in stage else "" for p in parts),
             f"{sum(stage.values()) / 2**30:.2f}"] for name, stage in plan.items()]) + "\n")
        enough = all(fits(stage, card * 2**30) for stage in plan.values())
        rows.append([f"{card:g} GB", "yes" if enough else "no", sizes.slots, sizes.score_tokens,
                     sizes.train_tokens, "yes" if sizes.recompute else "no"])
    print("With 1 GiB left to the driver:\n")
    print(table(("GPU", "all five stages fit", "slots", "scoring tokens", "training tokens",
                 "layers computed twice"), rows))
    return 0


# --------------------------------------------------------------------------------------------------
# How long

# What SmolLM2-135M-Instruct does; other models differ by some tens of per cent.
QUERY = 30  # tokens of a query
WRITTEN, SCORED = 125, 350  # tokens that stage 1 writes and scores for each query that it keeps
ANSWER = 540  # mean tokens of an answer that no limit cuts: 88 of at most 96, 330 of at most 512
WON = 0.4  # share of queries that the persona wins
TEMPLATE = 40  # tokens of a template, a system default, a judge's wording
WORTH_MEASURING = 1e12  # FLOPs
UNEVEN = 1.5  # what uneven lengths cost in time: padded batches, slots empty at a chunk's end
CONTEXT = 150  # tokens of a persona and its template
TEST_PAIRS = 10  # known pairs that a judge reads, as many of the answers being short ones


def training_flops(prism: PRISM, tokens: int, answer_tokens: int) -> int:
    """FLOPs of training on `tokens`, of which `answer_tokens` are predicted: forward through all
    layers, back to the input of the adapted ones (frozen weights get no gradient), these perhaps
    once more forward, and three products with the head."""
    adapted = len(prism.late_layers) * (2 if prism.net.sizes.recompute else 1)
    layers = len(prism.net.layers)
    return prism.net.flops(tokens * (layers + adapted) // layers, 3 * answer_tokens)


def expected_flops(prism: PRISM, settings: dict, queries: int | None = None) -> dict[str, float]:
    """FLOPs of a run by the kind of work: "writing" tokens, "reading" them, "training". `queries`
    says how many there are already; None where stage 1 is to write them."""
    flops, written, scored = prism.net.flops, 0, 0
    if queries is None:
        queries = len(settings["personas"]) * settings["queries"]
        written, scored = WRITTEN * queries, SCORED * queries
    answer = ANSWER * (1 - math.exp(-settings["max_new_tokens"] / ANSWER))
    written += 2 * queries * answer
    pairs = queries + TEST_PAIRS
    judged = pairs * (2 * (answer + TEMPLATE) + 4 * (QUERY + TEMPLATE))  # which query?
    judged += pairs * 4 * (QUERY + answer)  # how likely an answer?
    if asks_no_model(settings["judge"]):
        judged = 0
    fitted = 0.8 * queries * WON  # a fifth is held out
    taught = queries * WON * (CONTEXT + QUERY + answer)  # read by the teacher
    trained = fitted * settings["epochs"] * (QUERY + TEMPLATE + answer)
    read = scored + judged + taught
    return {"writing": flops(written, written), "reading": flops(read, 0.6 * judged),
            "training": training_flops(prism, int(trained), int(trained))}


def machine_speed(prism: PRISM) -> dict[str, float]:
    """FLOP/s here while writing, reading and training, each from half a second of work."""
    net = prism.net
    ids = torch.zeros(4, 64, dtype=torch.long, device=net.device)
    cache = KVCache(net, net.sizes.slots, 128)
    start = torch.full((net.sizes.slots,), 100, device=net.device)
    token = torch.zeros(net.sizes.slots, 1, dtype=torch.long, device=net.device)

    def write() -> None:
        at = net.positions(token.shape, cache, start, 128)
        net.head(net.norm(net.run(net.embed(token), at, range(len(net.layers)))))

    def train() -> None:
        with torch.enable_grad():
            net.hidden(ids, prism.adapter, len(ids)).sum().backward()
        prism.adapter.zero_grad()

    with torch.no_grad():
        return {"writing": net.flops(net.sizes.slots, net.sizes.slots) / seconds(write, net.device),
                "reading": net.flops(ids.numel(), 0) / seconds(lambda: net.hidden(ids), net.device),
                "training": training_flops(prism, ids.numel(), 0) / seconds(train, net.device)}


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that one call takes, from as many as fit into half a second after a first one."""
    def finish() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    finish()
    begun, calls = time.perf_counter(), 0
    while time.perf_counter() - begun < 0.5:
        finish()
        calls += 1
    return (time.perf_counter() - begun) / calls


def announce(prism: PRISM, settings: dict, run: RunFolder) -> None:
    """Print, on the error stream, what is going to run (`settings` as in run.json) and about how
    long it will take here; of a run that is over before a speed is measured, only the former."""
    source = " (its 4-bit release)" if settings["base_source"].startswith("gguf") else ""
    several = f", {world_size()} processes" if world_size() > 1 else ""
    there = len(run.read("queries.jsonl", Query)) or None  # somebody's own, or an earlier attempt's
    queries = f"{there} queries" if there else f"{settings['queries']} queries each"
    print(f"{settings['model']}{source} on {settings['device']} in {settings['dtype']}{several}, "
          f"{len(settings['personas'])} personas, {queries}, to {run.path}", file=sys.stderr)
    flops = expected_flops(prism, settings, there)
    if sum(flops.values()) < WORTH_MEASURING:
        return
    speed = machine_speed(prism)
    total = UNEVEN * sum(flops[kind] / speed[kind] for kind in flops)
    clock = f"{total / 60:.1f} min" if total < 5400 else f"{total / 3600:.1f} hours"
    speeds = ", ".join(f"{speed[kind] / 1e9:.0f} GFLOP/s {kind}" for kind in speed)
    print(f"about {clock} here for the whole run: {sum(flops.values()) / 1e12:.0f} TFLOP, at "
          f"{speeds}", file=sys.stderr)
