"""About how long a run will take here: its FLOPs, known from the settings, over this machine's
speed, measured in two seconds."""

from __future__ import annotations

import math
import sys
import time
from typing import Callable

import torch

from model import KVCache
from prism import PRISM
from queries import Query
from support.distributed import world_size
from support.memory import training_flops
from support.rule import asks_no_model
from support.runs import RunFolder

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
