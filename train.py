"""PRISM's five stages, top down.

    python train.py --quick

x is a query, c a persona (any context), y_0 and y_c the answers without and with it, t(x) the
verdict, h(x) what the gate reads, R(x) its probability. Stage 1 is in queries.py, stages 2 and 3 in
bootstrap.py and judge.py, stage 4 in gate.py, the losses in prism.py; stage 5 is below. A fifth of
the queries is held out from stage 5; the gate is scored out of fold and then fitted on all.
Everything under --out can be continued after a kill by running the same command again.
"""

import argparse
import math
import sys
import time
from dataclasses import dataclass
from typing import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from bootstrap import Pair, hold_out, run_verdicts, won_pairs, write_answers
from engine import hidden_states
from gate import run_gate
from model import Transformer, load
from prism import PRISM, answer_loss, distill_loss
from queries import write_queries
from sampling import derive_seed
from support.adapter import write_tensors
from support.device import batches, choose_device, choose_dtype, memory_of, pad, upload
from support.distributed import (HEAD_START, exchange, main_first, processes,
                                 progress_bar, rank, sum_gradients, world_size)
from support.estimate import announce, choose_sizes, dry_run, seconds, training_flops
from support.hub import InputError, exit_status, resolve, write_file
from support.messages import conversation
from support.report import summarize, write_card
from support.runs import (RunFolder, cost_of, load_training_state, run_date, spent_since,
                          split_chunks, training_state)
from support.settings import (CLIP, GATE_DEPTH, WARMUP, WEIGHT_DECAY,
                              check, check_judge, choose_personas, parser, run_settings)
from tokenizer import Tokenizer

CHECKPOINT_EVERY = 20  # optimizer steps
NOTHING_TO_DISTIL = 3  # exit status


def run_stages(run: RunFolder, prism: PRISM, tokenizer: Tokenizer, personas: dict[str, str],
               args: argparse.Namespace) -> int:
    """The method. Each stage takes up what is on disk; returns the exit status."""
    net = prism.net
    # 1. For each persona c the model writes queries x that this expert would shine at.
    queries = write_queries(run, net, tokenizer, personas, args.queries, args.seed,
                            args.query_style)
    if not queries:
        raise InputError("no candidate became a query (too short, cut off, an echo, an answer, or "
                         f"likelier under another persona: see {run.path / 'candidates.jsonl'}); "
                         "try more --queries, other personas or a larger model")
    if args.stop_after == "queries":
        return 0
    # 2. It answers each twice: y_0 ~ P(.|x) and y_c ~ P(.|c, x).
    pairs = write_answers(run, net, tokenizer, personas, queries, args.max_new_tokens, args.seed)
    if args.stop_after == "answers":
        return 0
    # 3. It judges its own answers: t(x) = 1 where y_c beats y_0 twice.
    verdicts = run_verdicts(run, net, tokenizer, personas, pairs, args)
    if args.stop_after == "verdicts":
        return 0
    won = won_pairs(pairs, verdicts)
    if not won:
        return NOTHING_TO_DISTIL
    # 4. The gate R(x) = sigmoid(MLP(h(x))) learns t(x), or x's intent, from the bare query.
    with main_first():  # the others load what it trained
        run_gate(run, prism, tokenizer, pairs, verdicts, args)
    if args.stop_after == "gate":
        return 0
    # 5. The adapter learns KL(P(.|c, x, y_<i) || P_lora(.|x, y_<i)) on the answers that won.
    run_lora(run, prism, tokenizer, personas, won, hold_out(verdicts, args.seed), args)
    if run.writes:
        found, report = summarize(run)
        write_card(run, found)
        write_file(run.path / "report.md", report)  # the last file of a run
    return 0


# --------------------------------------------------------------------------------------------------
# Stage 5: the adapter


@dataclass
class Sample:
    """One distillation sample: the bare prompt and answer ids, where the answer starts, the
    teacher's post-norm hidden states [n, d] at the positions that predict the n answer tokens, and
    how many tokens the teacher read."""

    name: str
    ids: list[int]
    start: int
    teacher: Tensor
    teacher_tokens: int = 0

    @property
    def answer_tokens(self) -> int:
        """Number of answer tokens n."""
        return len(self.ids) - self.start


def distill_samples(net: Transformer, tokenizer: Tokenizer, personas: dict[str, str],
                    pairs: Sequence[Pair], max_len: int) -> list[Sample]:
    """Pair every won query with its teacher: the base weights READING the persona.

    The teacher's hidden states are exact (the head's own input) and take 2 d bytes a token; its
    logits would take 2 V. Answers are cut so that the longer, teacher's sequence fits in max_len.
    Every process reads them all, which costs about a thirtieth of training on them.
    """
    samples = []
    for chunk in split_chunks(pairs):
        rows, starts = [], []
        for pair in chunk:
            prompt = tokenizer.render(conversation(pair.query, personas[pair.persona]))
            rows.append([*prompt, *pair.expert_ids[:max(max_len - len(prompt), 0)]])
            starts.append(len(prompt) - 1)
        states, _ = hidden_states(net, rows, starts, bar="reading the teacher")
        for pair, row, start, state in zip(chunk, rows, starts, states):
            answer = row[start + 1:]
            bare = tokenizer.render(conversation(pair.query))
            if answer:
                teacher = state[:-1].cpu()  # the last one predicts what follows the answer
                samples.append(Sample(f"{pair.persona}/{pair.index}", [*bare, *answer], len(bare),
                                      teacher, len(row)))
    return samples


def sample_loss(prism: PRISM, samples: Sequence[Sample], temperature: float,
                generator: torch.Generator | None = None, loss: str = "kl") -> Tensor:
    """Summed loss of a micro-batch: the student reads the bare prompt, all rows gated. "kl" is
    PRISM's; "sft" is the cross-entropy of the won answers, the paper's baseline."""
    net = prism.net
    ids, _ = pad([s.ids for s in samples], net.device)
    teacher = upload(torch.cat([s.teacher for s in samples]), net.device)
    hidden = net.hidden(ids, prism.adapter, k=len(samples), generator=generator)
    states, answers = [], []
    for row, s in zip(hidden, samples):
        states.append(row[s.start - 1:len(s.ids) - 1])  # those that predict the answer's tokens
        answers += s.ids[s.start:]
    student = torch.cat(states)
    if loss == "sft":
        return answer_loss(student, torch.tensor(answers, device=net.device), net)
    return distill_loss(student, teacher, net, temperature)


def micro_batches(samples: Sequence[Sample], tokens: int) -> list[list[Sample]]:
    """Split samples, by length, into groups of at most `tokens` padded tokens."""
    samples = sorted(samples, key=lambda s: s.name)  # breaks ties of length
    groups = batches([len(s.ids) for s in samples], tokens)
    return [[samples[i] for i in group] for group in groups]


@torch.no_grad()
def held_out_kl(prism: PRISM, samples: Sequence[Sample]) -> float | None:
    """Mean forward KL to the teacher, nats per answer token, at temperature 1, no dropout."""
    tokens = sum(s.answer_tokens for s in samples)
    summed = 0.0
    groups = micro_batches(samples, prism.net.sizes.train_tokens)
    for group in progress_bar("held-out KL", "batch", groups[rank()::world_size()]):
        summed += float(sample_loss(prism, group, 1.0))
    summed = sum(exchange(summed))
    return summed / tokens if tokens else None


def batch_gradient(prism: PRISM, batch: Sequence[Sample], step: int,
                   args: argparse.Namespace) -> float:
    """Add the gradient of a batch's loss to A and B: the summed token loss over the answer tokens
    of the whole batch, however it is split into micro-batches and processes. Returns that loss."""
    tokens = sum(s.answer_tokens for s in batch)
    summed = 0.0
    mine = sorted(batch, key=lambda s: (len(s.ids), s.name))[rank()::world_size()]
    for number, group in enumerate(micro_batches(mine, prism.net.sizes.train_tokens)):
        seed = derive_seed(args.seed, "dropout", step, number * world_size() + rank())
        generator = torch.Generator(prism.net.device).manual_seed(seed)
        loss = sample_loss(prism, group, args.kd_temperature, generator, args.loss)
        loss.backward()
        summed += loss.item()
    sum_gradients(prism.adapter.parameters())
    for p in prism.adapter.parameters():
        p.grad.div_(tokens)  # only here, in fp32: in fp16 a gradient this small would be 0
    return sum(exchange(summed)) / tokens


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first steps, then linear decay to zero after the last."""
    warmup = max(1, round(WARMUP * steps))
    return peak * min((step + 1) / warmup, (steps - step) / max(steps - warmup, 1))


def prompt_cost(net: Transformer, samples: Sequence[Sample]) -> dict[str, float]:
    """Mean prompt tokens of a query with its context and without, and the seconds that reading so
    many takes: what the adapter saves where the gate opens."""
    cost = {}
    for name, tokens in (("with", [s.teacher_tokens - s.answer_tokens for s in samples]),
                         ("without", [s.start for s in samples])):
        mean = sum(tokens) / len(tokens)
        ids = torch.zeros(1, round(mean), dtype=torch.long, device=net.device)
        with torch.inference_mode():
            taken = seconds(lambda: net.hidden(ids), net.device)
        cost |= {f"tokens_{name}": mean, f"seconds_{name}": taken}
    return cost


def train_lora(run: RunFolder, prism: PRISM, samples: Sequence[Sample],
               args: argparse.Namespace) -> None:
    """Stage 5: distil the persona's answers into prism.adapter, from the last checkpoint on.

    A, B and the optimizer are fp32, and the same in every process.

    Raises:
        InputError: a loss or gradient that is not finite; the last checkpoint is kept.
    """
    parameters = list(prism.adapter.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=WEIGHT_DECAY)
    per_epoch = math.ceil(len(samples) / args.batch_size)
    steps = per_epoch * args.epochs
    checkpoint = run.path / "checkpoint.safetensors"
    first = load_training_state(checkpoint, parameters, optimizer)
    bar = tqdm(range(first, steps), "lora", steps, initial=first, unit="step", dynamic_ncols=True,
               disable=not run.writes)
    for step in bar:
        begun = time.perf_counter()
        epoch, number = divmod(step, per_epoch)
        order = sorted(samples, key=lambda s: derive_seed(args.seed, "epoch", epoch, s.name))
        batch = split_chunks(order, args.batch_size)[number]
        loss = batch_gradient(prism, batch, step, args)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, CLIP))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise InputError(f"stage 5, step {step}: loss {loss}, gradient norm {norm} "
                             f"on {', '.join(s.name for s in batch)}; try a lower --lr or "
                             "--dtype float32 (the last checkpoint is kept)")
        rate = learning_rate(step, steps, args.lr)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        tokens = sum(s.answer_tokens for s in batch)
        flops = training_flops(prism, sum(len(s.ids) for s in batch), tokens)
        run.record("lora", step, loss=loss, gradient_norm=norm, lr=rate, samples=len(batch),
                   tokens_trained=tokens, flops=flops, **spent_since(begun))
        bar.set_postfix({args.loss: f"{loss:.4f}"})
        if run.writes and (step + 1) % CHECKPOINT_EVERY == 0 and step + 1 < steps:
            write_tensors(checkpoint, training_state(parameters, optimizer))


def run_lora(run: RunFolder, prism: PRISM, tokenizer: Tokenizer, personas: dict[str, str],
             won: Sequence[Pair], held: set, args: argparse.Namespace) -> None:
    """Stage 5 as a resumable step: cache the teacher, train, measure the held-out KL."""
    state = run.path / "checkpoint.safetensors"
    if "kl" in run.latest() and (run.path / "prism.json").exists():  # the last file of `save`
        state.unlink(missing_ok=True)
        return
    begun = time.perf_counter()
    samples = distill_samples(prism.net, tokenizer, personas, won, args.max_len)
    held_names = {f"{persona}/{index}" for persona, index in held}
    fit = [s for s in samples if s.name not in held_names]
    test = [s for s in samples if s.name in held_names]
    if not fit:
        raise InputError(f"no answer fits in --max-len {args.max_len} beside its persona; raise it")
    before = held_out_kl(prism, test)  # B is zero: this is the base model
    before_training = time.perf_counter()
    train_lora(run, prism, fit, args)
    begun += time.perf_counter() - before_training  # its steps have rows of their own
    after = held_out_kl(prism, test)
    spent = spent_since(begun)
    tokens = sum(s.answer_tokens for s in test)
    # Two evaluations of the held-out answers, each with the head for teacher and student.
    read = sum(s.teacher_tokens for s in samples) + 2 * sum(len(s.ids) for s in test)
    cost = cost_of(prism.net, len(samples), read, scored=4 * tokens)
    run.record("kl", 0, held_out_samples=len(test), before=before, after=after,
               answer_tokens=tokens, **prompt_cost(prism.net, samples), **cost, **spent)
    if run.writes:
        prism.save(run.path)
        state.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# The command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(lambda: _main(parser().parse_args(argv)))


def _main(args: argparse.Namespace) -> int:
    """Check everything that is cheap to check, then run."""
    with processes(choose_device(args.device)) as device:
        check(args)
        if args.dry_run:
            return dry_run(args) if rank() == 0 else 0
        status = run_all(args, device)
        if status and rank() > 0:  # torchrun ends all as soon as one has left; the first speaks
            time.sleep(HEAD_START)
        return status


def run_all(args: argparse.Namespace, device: torch.device) -> int:
    """Load the model, then run the stages in the locked output folder; returns the exit status."""
    personas = choose_personas(args)
    with main_first():  # it may have to fetch them
        folder = resolve(args.model)
        check_judge(args, folder)
    net = load(folder, device, choose_dtype(args.dtype, device))
    net.name = args.model
    tokenizer = Tokenizer(folder)
    if args.gate_layer is None:
        args.gate_layer = len(net.layers) // GATE_DEPTH
    prism = PRISM(net, args.rank, args.alpha, args.gate_layer, args.gate_pool, args.dropout,
                  args.seed)
    longest = max(len(tokenizer.render(conversation("", text))) for text in personas.values())
    net.sizes = choose_sizes(prism, args, memory_of(device), longest)
    settings = run_settings(args, net, folder, personas)
    with RunFolder(args.out) as run:
        with main_first():
            run.begin(settings, args.overwrite, args.redo)
        if run.complete:
            if rank() == 0:
                print(f"{run.path}: complete already; --overwrite runs it again, --from STAGE a "
                      "part")
            return 0
        tokenizer.now = run_date(run.path)
        if rank() == 0:
            announce(prism, settings, run)
        status = run_stages(run, prism, tokenizer, personas, args)
        run.end()
    if rank() == 0:
        found, _ = summarize(run)
        print("", *found, "", sep="\n")
        print(f"saved in {run.path}; report.md has more")
        if status == NOTHING_TO_DISTIL:
            print("nothing to distil: the persona won no query, so there is no adapter; the data "
                  "is kept. Try more --queries, other personas, or a larger model.",
                  file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
