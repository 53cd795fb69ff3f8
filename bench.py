"""Speed and memory beside what people would otherwise run: transformers `generate` and peft.

    python bench.py                                  # the default parts
    python bench.py --only kl,sampler --json out.json
    python bench.py --shape qwen2.5-7b               # random weights of that shape, no files

Same weights, prompts and dtype on both sides, interleaved in one process, the median of --repeats
(of a third of it where a repetition takes long, of one for whole runs). `floor` is what the
hardware would need at least, measured in the same run: the bare matrix products of that shape with
nothing around them. The adapter is on the layers that train.py adapts by default, with random B;
peft reads the same files, A and B in the base's dtype. transformers and peft are optional and
imported only here; without them the columns of the peer stay empty. Figures that fall short are
printed as they are.
"""

import argparse
import contextlib
import functools
import gc
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Callable, Iterable, Iterator, Sequence
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import train
from engine import Engine, Output, PrefixReader, Request
from generate import stop_tokens
from lora import GatedLoRALinear, LoRA
from model import KVCache, RMSNorm, Transformer, load
from prism import PRISM, LinearKL, distill_loss
from support import report
from sampling import Sampling, derive_seed, sample
from support.config import Config, cache_bytes
from support.cpu import linear
from support.device import choose_device, choose_dtype, memory_of, pad
from support.distributed import progress_bar
from support.hub import (DEFAULT_MODEL, InputError, Parser, exit_status, read_json, resolve,
                         write_file)
from support.estimate import choose_sizes, training_flops
from support.personas import load_personas
from support.runs import peak_memory, split_chunks
from tokenizer import Tokenizer

QWEN_VOCAB = 151_936  # the vocabulary of Qwen2.5, where loss and sampler matter most
NEW_TOKENS = 128  # of an answer in the stage-2 workload
SHAPES = Path(__file__).parent / "tests" / "shapes"  # config.json of public models, by name
QUICK = ["--quick"]  # the pipeline's settings
STAGES = ("personas", "queries", "style", "quality", "answers", "judge", "verdicts", "gate", "lora")


@dataclass
class Row:
    """A line of the table. `ours`, `peer` and `floor` are seconds, bytes or counts in `unit`; the
    smaller the better unless `unit` ends in "/s"."""

    part: str
    unit: str
    ours: float
    peer: float | None = None
    floor: float | None = None

    @property
    def gain(self) -> float | None:
        """How many times better than the peer."""
        if self.peer is None or self.ours <= 0:
            return None
        return self.ours / self.peer if self.unit.endswith("/s") else self.peer / self.ours


def medians(functions: dict[str, Callable[[], object]], repeats: int,
            warmup: int = 1) -> dict[str, float]:
    """Median seconds of each function, called in turn (so that drift hits all alike)."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    calls = [(turn, name) for turn in range(repeats + warmup) for name in functions]
    for turn, name in progress_bar("timing", "call", calls):
        gc.collect()
        begun = time.perf_counter()
        functions[name]()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if turn >= warmup:
            times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(t) for name, t in times.items()}


def row(part: str, unit: str, found: dict[str, float], scale: float = 1.0) -> Row:
    """A row of the figures found of "ours", the "peer" and the "floor", some of which may not have
    been measured."""
    return Row(part, unit, **{name: found[name] * scale for name in ("ours", "peer", "floor")
                              if name in found})


def by_length(rows: Sequence[Sequence[int]], size: int) -> Iterable[list[int]]:
    """Indices of the rows, at most `size` of like length at a time: little padding for a peer."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    return progress_bar("the peer", "batch", split_chunks(order, size))


def naive_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Summed forward KL of whole logits [N, V], as it is usually written."""
    return F.kl_div(student.float().log_softmax(-1), teacher.float().log_softmax(-1),
                    log_target=True, reduction="sum")


@dataclass(frozen=True)
class Workload:
    """How much a part does: a GPU needs more to be busy."""

    prompts: int = 96  # of the stage-2 workload
    peer_batches: tuple[int, ...] = (8, 32)
    peer_rows: int = 8  # of a training step at once, in the peer: its activations are large
    routed: int = 90  # tokens of the prompt whose first token is waited for
    trained: tuple[int, int] = (16, 512)  # rows and tokens of a step; half of each row is answer


ON_CPU, ON_GPU = Workload(), Workload(512, (256,), 2, 512, (16, 1024))


class Setup:
    """What the parts share: our model, its adapter with random B, and the peer's, if installed.

    With a `shape`, the config.json of a model, both sides have random weights of that shape, each
    its own: right for speed and memory, and nothing is fetched. Prompts are the default model's.
    """

    def __init__(self, name: str, device: str, dtype: str, repeats: int, shape: Path | None = None,
                 with_peer: bool = True):
        where = choose_device(device)
        self.repeats, self.shape = repeats, shape
        if shape is None:
            self.net = load(name, where, choose_dtype(dtype, where))
            self.tokenizer = Tokenizer(self.net.folder)
            self.stop = stop_tokens(self.net, self.tokenizer)
        else:
            self.net, self.stop = random_net(shape, where, choose_dtype(dtype, where)), set()
            self.tokenizer = Tokenizer(resolve(DEFAULT_MODEL))
        self.work = ON_GPU if where.type == "cuda" else ON_CPU
        self.prism = PRISM(self.net, gate_layer=len(self.net.layers) // train.GATE_DEPTH)
        defaults = train.parser().parse_args(["--max-new-tokens", str(NEW_TOKENS)])
        self.net.sizes = choose_sizes(self.prism, defaults, memory_of(where))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for module in self.prism.adapter.modules():
                for b in module.B if isinstance(module, LoRA) else ():
                    b.copy_(torch.randn(b.shape, generator=generator) * 0.01)
        self.has_peer = with_peer and peers_installed()

    @functools.cached_property
    def peer(self) -> torch.nn.Module:
        """The same checkpoint in transformers."""
        return self.peer_model().eval()

    @functools.cached_property
    def peer_lora(self) -> torch.nn.Module:
        """That checkpoint with our adapter in peft, on a copy of its own."""
        from peft import PeftModel
        with tempfile.TemporaryDirectory() as folder:
            self.prism.save(folder)
            path = Path(folder) / "adapter_config.json"  # saved for inference: no dropout
            path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_dropout": 0.05}))
            model = self.peer_model()
            with torch.inference_mode(False):
                return PeftModel.from_pretrained(
                    model, folder, is_trainable=True, autocast_adapter_dtype=False).eval()

    def peer_model(self) -> torch.nn.Module:
        """transformers' model of the checkpoint, or of the shape."""
        from transformers import AutoConfig, AutoModelForCausalLM
        # The first use may be inside inference mode, whose tensors could not be trained on.
        with torch.inference_mode(False):
            if self.shape is None:
                return AutoModelForCausalLM.from_pretrained(
                    self.net.folder, dtype=self.net.dtype).to(self.net.device)
            config = AutoConfig.for_model(**read_json(self.shape))
            with self.net.device:
                return AutoModelForCausalLM.from_config(config, dtype=self.net.dtype)

    def prompts(self, n: int) -> list[list[int]]:
        """n prompts of mixed length (about 40 to 190 tokens) made from the personas' texts."""
        words = " ".join(load_personas(Path(__file__).parent / "personas").values()).split()
        return [self.tokenizer.render([{"role": "user", "content": "Explain this to a child: "
                                        + " ".join(words[i * 7:i * 7 + 5 + i * 37 % 120])}])
                for i in range(n)]


def peers_installed() -> bool:
    """Whether transformers and peft can be imported."""
    try:
        import peft  # noqa: F401
        import transformers  # noqa: F401
    except ImportError:
        return False
    return True


def random_net(path: Path, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A net of a config.json with random weights, made on the device."""
    config = replace(Config.from_json(read_json(path), str(path)), dtype=dtype)
    with device:
        net = Transformer(config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(0.0, 0.02)
        for module in net.modules():
            if isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
    return net.eval()


def loading(s: Setup) -> list[Row]:
    """From a folder to a model, its files in the system's cache: as the first thing a process does
    after its imports, and again."""
    script = """import sys, time, torch; from {} import {} as load; times = []
for _ in range(2):
    begun = time.perf_counter()
    load(sys.argv[1], dtype=getattr(torch, sys.argv[2])).to(sys.argv[3])
    times.append(time.perf_counter() - begun)
print(*times)"""
    scripts = {"ours": script.format("model", "load")}
    if s.has_peer:
        scripts["peer"] = script.replace("load(", "load.from_pretrained(").format(
            "transformers", "AutoModelForCausalLM")
    arguments = str(s.net.folder), str(s.net.dtype).removeprefix("torch."), str(s.net.device)
    times: dict[str, list] = {name: [] for name in scripts}
    for name in progress_bar("loading", "process", [*scripts] * s.repeats):
        done = subprocess.run([sys.executable, "-c", scripts[name], *arguments], check=True,
                              text=True, cwd=Path(__file__).parent, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL)
        times[name].append([float(t) for t in done.stdout.split()])
    first, again = zip(*(map(statistics.median, zip(*t)) for t in times.values()))
    return [Row("loading, the first in a process", "s", *first),
            Row("loading, again (peer, in bf16: only maps the file)", "s", *again)]


# --------------------------------------------------------------------------------------------------
# Generation


def generation(s: Setup) -> list[Row]:
    """The stage-2 workload end to end."""
    prompts, stop = s.prompts(s.work.prompts), s.stop
    counts: dict[str, int] = {}

    def ours() -> None:
        engine = Engine(s.net, Sampling(NEW_TOKENS, 0.7), stop)
        counts["ours"] = sum(len(o.ids) for o in engine.run(
            [Request(p, derive_seed("bench", i)) for i, p in enumerate(prompts)]))

    def theirs(name: str, batch: int) -> None:
        torch.manual_seed(0)
        counts[name] = 0
        for some in by_length(prompts, batch):
            answers = peer_generate(s, [prompts[i] for i in some], NEW_TOKENS, stop, 0.7)
            counts[name] += sum(map(len, answers))

    def continuous() -> None:
        answers = peer_continuous(s, prompts, NEW_TOKENS, stop, 0.7)
        counts["; peer by continuous batching"] = sum(map(len, answers))

    functions: dict[str, Callable] = {"ours": ours}
    list(Engine(s.net, Sampling(4, 0.7), stop).run([Request(p) for p in prompts[:2]]))  # warms up
    if s.has_peer:
        peer_generate(s, prompts[:2], 4, stop, 0.7)  # loads it
        for batch in s.work.peer_batches:
            name = f"; peer at batch {batch}"
            functions[name] = functools.partial(theirs, name, batch)
        functions["; peer by continuous batching"] = continuous
    seconds = medians(functions, max(1, s.repeats // 3), warmup=0)
    speed = {name: counts[name] / t for name, t in seconds.items()}
    return [Row(f"generation, stage-2 workload{name}", "tokens/s", speed["ours"], speed.get(name))
            for name in list(speed)[1:] or [""]]


def decoding(s: Setup) -> list[Row]:
    """A decode step against its floor, and a single stream."""
    rows, prompt = decode_step(s, 8), s.prompts(1)[0]
    if s.net.device.type == "cuda":
        rows += decode_step(s, 32, keys=1024) + decode_step(s, 256)

    def single() -> None:
        engine = Engine(s.net, Sampling(64, 0.0), set(), 1)
        list(engine.run([Request(prompt)]))
    functions = {"ours": single}
    if s.has_peer:
        functions["peer"] = lambda: peer_generate(s, [prompt], 64, set(), 0.0)
    t = medians(functions, s.repeats)
    speed = {name: 64 / seconds for name, seconds in t.items()}
    return [*rows, row("single stream, 64 tokens", "tokens/s", speed)]


@torch.inference_mode()
def peer_generate(s: Setup, prompts: Sequence[list[int]], new_tokens: int, stop: set[int],
                  temperature: float) -> list[list[int]]:
    """transformers' generate on one left-padded batch; the ids it wrote, up to the stop token."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=s.net.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts],
                        device=s.net.device)
    how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {
        "do_sample": False}
    out = s.peer.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens,
                          min_new_tokens=None if stop else new_tokens, pad_token_id=0,
                          eos_token_id=sorted(stop) or None, **how)[:, longest:].tolist()
    return [ids[:next((i + 1 for i, t in enumerate(ids) if t in stop), len(ids))] for ids in out]


def peer_continuous(s: Setup, prompts: Sequence[list[int]], new_tokens: int, stop: set[int],
                    temperature: float) -> list[list[int]]:
    """transformers' continuous batching, its closest relative of our engine. It sizes its cache by
    a GPU's memory; on a CPU it has to be told."""
    from transformers import ContinuousBatchingConfig, GenerationConfig
    settings = GenerationConfig(max_new_tokens=new_tokens, do_sample=True, top_k=0, pad_token_id=0,
                                temperature=temperature, eos_token_id=sorted(stop) or None)
    size = {} if s.net.device.type == "cuda" else {"num_blocks": 128, "max_batch_tokens": 512}
    done = s.peer.generate_batch(list(prompts), settings, ContinuousBatchingConfig(**size))
    return [answer.generated_tokens for answer in done.values()]


@torch.inference_mode()
def decode_step(s: Setup, batch: int, keys: int = 200) -> list[Row]:
    """One decoding step of `batch` rows at `keys` cached tokens, against transformers' own and
    against the bare products with every weight matrix (on a GPU, also against its memory)."""
    net = s.net
    functions = {"ours": our_step(s, batch, 0, keys), "floor": floor_step(net, batch)}
    if s.has_peer:
        functions["peer"] = peer_step(s.peer, s, batch, keys)
    t = medians(functions, 4 * s.repeats, warmup=2)
    name = f"decode step, batch {batch}, {keys} keys (floor: "
    rows = [row(name + "the products alone)", "ms", t, 1e3)]
    if net.device.type == "cuda":
        read = sum(p.numel() * p.element_size() for p in net.parameters())
        read += batch * keys * cache_bytes(net.config, net.dtype)
        t["floor"] = read / copy_rate(net.device)
        rows.append(row(name + "weights and cache at the rate of a copy)", "ms", t, 1e3))
    return rows


def copy_rate(device: torch.device) -> float:
    """Bytes/s that a plain copy of a gigabyte reads and writes."""
    source = torch.zeros(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / medians({"copy": lambda: target.copy_(source)}, 3)["copy"]


def our_step(s: Setup, batch: int, k: int, keys: int) -> Callable[[], Tensor]:
    """A function that advances `batch` rows by one token, the adapter on the first k."""
    net, cache = s.net, KVCache(s.net, batch, keys + 1)
    tokens = torch.arange(batch, device=net.device)[:, None]
    start = torch.full((batch,), keys, device=net.device)

    @torch.inference_mode()
    def step() -> Tensor:
        at = net.positions((batch, 1), cache, start, keys + 1)
        x = net.run(net.embed(tokens), at, range(len(net.layers)), s.prism.adapter, k)
        return sample(net.head(net.norm(x[:, -1])), Sampling(1, 0.0), start)  # greedy: no draw
    return step


def floor_step(net: Transformer, rows: int) -> Callable[[], None]:
    """The products of `rows` states with every weight matrix, nothing else."""
    weights = [m.weight for m in net.modules() if isinstance(m, GatedLoRALinear)] + [net.lm_head]
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1], device=net.device).to(net.dtype)
              for w in weights}

    @torch.inference_mode()
    def run() -> None:
        for w in weights:
            linear(inputs[w.shape[1]], w)
    return run


def peer_step(model: torch.nn.Module, s: Setup, batch: int, keys: int,
              **kwargs: object) -> Callable[[], None]:
    """The same step in transformers: its cache is cut back to `keys` tokens after each."""
    ids = torch.arange(batch * keys, device=s.net.device).view(batch, keys) % 1000 + 5
    with torch.inference_mode():
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1,
                      **kwargs).past_key_values
    token = torch.arange(batch, device=s.net.device)[:, None]

    @torch.inference_mode()
    def step() -> None:
        model(input_ids=token, past_key_values=cache, use_cache=True,
              **kwargs).logits[:, -1].argmax(-1)
        cache.crop(-1)  # take the token back
    return step


# --------------------------------------------------------------------------------------------------
# Routing and the gated layer


def routing(s: Setup) -> list[Row]:
    """Time to the first token with the gate in the way, and decoding with adapted rows."""
    rows, prompt = [], sum(s.prompts(40), [])[:s.work.routed]
    ids, lengths = pad([prompt], s.net.device)
    peer = s.peer_lora.eval() if s.has_peer else None

    @torch.inference_mode()
    def routed() -> None:
        cache = KVCache(s.net, *ids.shape)
        s.net.head(s.prism.prefill(ids, lengths, "auto", cache).hidden).argmax(-1)

    @torch.inference_mode()
    def base() -> None:
        x, _, _ = PrefixReader(s.net).read([prompt], [0])
        s.net.head(s.net.norm(x[:, -1])).argmax(-1)

    @torch.inference_mode()
    def twice() -> None:  # the authors' way: the base's states for the gate, then once more
        with peer.disable_adapter():
            peer(input_ids=ids, output_hidden_states=True, use_cache=False, logits_to_keep=1)
        peer(input_ids=ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)

    for route, threshold in (("adapter", 0.0), ("base", 1.1)):
        s.prism.threshold = threshold
        functions = {"ours": routed, "floor": base} | ({"peer": twice} if s.has_peer else {})
        t = medians(functions, 2 * s.repeats)
        rows.append(row(f"time to first token, {len(prompt)} tokens, routed to the {route} (floor: "
                        "base model; peer: two forwards)", "ms", t, 1e3))
    s.prism.threshold = 0.5
    functions = {"base": our_step(s, 8, 0, 200), "all": our_step(s, 8, 8, 200),
                 "half": our_step(s, 8, 4, 200)}
    if s.has_peer:
        half = ["default"] * 4 + ["__base__"] * 4
        functions |= {"peer base": peer_step(s.peer, s, 8, 200),
                      "peer all": peer_step(peer, s, 8, 200),
                      "peer half": peer_step(peer, s, 8, 200, adapter_names=half)}
    t = medians(functions, 4 * s.repeats, warmup=2)
    for name in ("all", "half"):
        step, relative = {"ours": t[name], "floor": t["base"]}, {"ours": t[name] / t["base"]}
        if s.has_peer:
            step["peer"] = t[f"peer {name}"]
            relative["peer"] = t[f"peer {name}"] / t["peer base"]
        rows += [row(f"decode step, {name} of 8 rows gated", "ms", step, 1e3),
                 row(f"decode step, {name} of 8 rows gated, relative to none", "x",
                     relative | {"floor": 1.0})]
    return [*rows, Row("un-gated rows bit-equal to the base (1 = yes)", "count",
                       float(bit_equal(s)), floor=1.0)]


@torch.inference_mode()
def bit_equal(s: Setup) -> bool:
    """Whether the un-gated rows of a mixed batch are the base model's, bit for bit: logits of whole
    prompts, and of one decoding step."""
    ids = pad([p[:40] for p in s.prompts(8)], s.net.device)[0]
    return all(torch.equal(s.prism(x, 4)[4:], s.net(x)[4:]) for x in (ids, ids[:, :1]))


# --------------------------------------------------------------------------------------------------
# Training


def lora(s: Setup) -> list[Row]:
    """The adapter while training, dropout included on both sides: forward and backward of a layer's
    adapted linears against the frozen ones, what a layer keeps in between, and a whole step."""
    vars(s).pop("peer", None)  # peft has a copy of its own
    net, block, adapter = s.net, s.net.layers[-1], s.prism.adapter[-1]
    linears = {name.rpartition(".")[2]: m for name, m in block.named_modules()
               if isinstance(m, GatedLoRALinear)}
    generator = torch.Generator(net.device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(16, 256, *shape, generator=generator, device=net.device).to(net.dtype)

    x = {n: random(m.weight.shape[1]).requires_grad_() for n, m in linears.items()}
    dy = {n: random(len(m.weight)) for n, m in linears.items()}

    def ours(k: int) -> Callable[[], None]:
        def run() -> None:
            for n, m in linears.items():
                wanted = [x[n], *adapter[n].parameters()] if k else [x[n]]
                torch.autograd.grad(m(x[n], adapter[n], k, generator), wanted, dy[n])
        return run

    def whole(k: int) -> int:
        at = net.positions((16, 256))
        return saved_bytes(lambda: block(dy["o_proj"].clone().requires_grad_(), at, adapter, k,
                                         generator), net)
    functions, kept = {"ours": ours(16), "floor": ours(0)}, {"ours": whole(16), "floor": whole(0)}
    if s.has_peer:
        functions["peer"], kept["peer"], kept["peer floor"] = peer_layer(s, x, dy)
    t = medians(functions, 2 * s.repeats)
    rows = [row("adapted linears of a layer, forward + backward, 4,096 tokens (floor: frozen)",
                "ms", t, 1e3),
            row("memory a whole layer keeps for backward (floor: frozen)", "MiB", kept, 2**-20)]
    if s.has_peer:
        more = {"ours": kept["ours"] - kept["floor"], "peer": kept["peer"] - kept["peer floor"]}
        rows.append(row("adapted layer minus frozen one, the same", "MiB", more, 2**-20))
    return rows + training_step(s)


def peer_layer(s: Setup, x: dict[str, Tensor],
               dy: dict[str, Tensor]) -> tuple[Callable[[], None], int, int]:
    """peft on the same layer: a function for its linears, bytes kept by the layer with its adapter
    and by the layer without."""
    model = s.peer_lora.train().base_model.model.model
    layer = model.layers[-1]
    parts = {"qkv_proj": [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj],
             "o_proj": [layer.self_attn.o_proj], "down_proj": [layer.mlp.down_proj],
             "gate_up_proj": [layer.mlp.gate_proj, layer.mlp.up_proj]}

    def linears() -> None:
        for n, modules in parts.items():
            wanted = [x[n], *(p for m in modules for p in m.parameters() if p.requires_grad)]
            found = [m(x[n]) for m in modules]
            torch.autograd.grad(found, wanted, dy[n].split([y.shape[-1] for y in found], -1))

    def whole() -> int:
        positions = torch.arange(256, device=s.net.device)[None]
        rotary = model.rotary_emb(dy["o_proj"], positions)
        return saved_bytes(lambda: layer(dy["o_proj"].clone().requires_grad_(),
                                         position_embeddings=rotary), model)
    adapted = whole()
    with s.peer_lora.disable_adapter():
        return linears, adapted, whole()


def saved_bytes(forward: Callable[[], object], model: torch.nn.Module) -> int:
    """Bytes of all distinct tensors but weights that a forward pass keeps for its backward pass."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = forward()
    del kept
    return sum(seen.values())


def our_training_step(s: Setup) -> Callable[[], None]:
    """A function that does a whole distillation step, half of each row is answer."""
    ids, teacher = training_rows(s)
    part_rows = max(1, s.net.sizes.train_tokens // ids.shape[1])
    optimizer = torch.optim.AdamW(s.prism.adapter.parameters(), lr=1e-9)
    dropout = torch.Generator(s.net.device).manual_seed(0)
    answer_tokens = teacher.shape[:2].numel()

    def step() -> None:
        for part, taught in zip(ids.split(part_rows), teacher.split(part_rows)):
            hidden = s.net.hidden(part, s.prism.adapter, len(part), dropout)
            loss = distill_loss(hidden[:, answer_of(ids)].flatten(0, 1), taught.flatten(0, 1),
                                s.net)
            (loss / answer_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def training_rows(s: Setup) -> tuple[Tensor, Tensor]:
    """Random ids [B, T] of a training step, and a teacher's states [B, T / 2, d]."""
    generator = torch.Generator().manual_seed(0)
    (rows, tokens), d = s.work.trained, s.net.config.hidden_size
    ids = torch.randint(5, 1000, (rows, tokens), generator=generator).to(s.net.device)
    teacher = torch.randn(rows, tokens // 2, d, generator=generator)
    return ids, teacher.to(s.net.device, s.net.dtype)


def answer_of(ids: Tensor) -> slice:
    """The positions that predict the second half of each row."""
    return slice(ids.shape[1] // 2 - 1, ids.shape[1] - 1)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a bare matrix product [n, n] x [n, n], the median of three."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / medians({"product": lambda: a @ a}, 3)["product"]


def training_step(s: Setup) -> list[Row]:
    """A whole distillation step beside peft's."""
    (rows, tokens), (ids, teacher) = s.work.trained, training_rows(s)
    functions = {"ours": our_training_step(s)}
    if s.has_peer:
        model = s.peer_lora.train()
        theirs = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-9)

        def peer() -> None:
            for part, taught in zip(ids.split(s.work.peer_rows), teacher.split(s.work.peer_rows)):
                logits = model(input_ids=part).logits[:, answer_of(ids)].flatten(0, 1)
                with torch.no_grad():
                    target = s.net.head(taught.flatten(0, 1))
                (naive_kl(logits, target) / (rows * tokens // 2)).backward()
            theirs.step()
            theirs.zero_grad()
        functions["peer"] = peer
    t = medians(functions, max(1, s.repeats // 3))
    peaks = {}
    for name in progress_bar("peak memory", "step", [*functions]):
        peaks[name] = peak_bytes(functions[name], s.net.device)
    name = f"training step, {rows} x {tokens} tokens, exact KL (peer: peft, whole logits, naive KL)"
    flops = training_flops(s.prism, rows * tokens, rows * tokens // 2)
    t["floor"] = flops / product_rate(s.net.device, s.net.dtype)
    return [row(name + "; floor: its FLOPs at a bare product's rate", "s", t),
            row(name + ", peak", "GiB", peaks, 2**-30)]


def kl(s: Setup) -> list[Row]:
    """The exact KL at Qwen's vocabulary, 256 answer tokens, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    d = 896

    def random(rows: int) -> Tensor:
        return torch.randn(rows, d, generator=generator).to(s.net.device, s.net.dtype)

    weight, teacher = random(QWEN_VOCAB) * 0.02, random(256)
    student = (teacher + 0.1 * random(256)).requires_grad_()

    def part(some: Tensor, targets: Tensor) -> Tensor:
        return naive_kl(some @ weight.T, targets @ weight.T)

    def ours() -> None:
        torch.autograd.grad(LinearKL.apply(student, teacher, weight, 1.0), student)

    def naive() -> None:
        torch.autograd.grad(part(student, teacher), student)

    def chunked() -> None:  # as TRL's trainers do: each chunk's logits are made twice
        parts = zip(student.split(64), teacher.split(64))
        loss = sum(checkpoint(part, *both, use_reentrant=False) for both in parts)
        torch.autograd.grad(loss, student)

    @torch.no_grad()
    def floor() -> None:
        teacher @ weight.T
        (student @ weight.T) @ weight

    functions = {"ours": ours, "naive": naive, "chunked": chunked}
    t = medians(functions | {"floor": floor}, s.repeats)
    peak = {name: peak_bytes(f, s.net.device) for name, f in functions.items()}
    rows = []
    for name in ("naive", "chunked"):
        rows += [row(f"exact KL, 256 tokens x 151,936, forward + backward (peer: {name})", "ms",
                     t | {"peer": t[name]}, 1e3),
                 row(f"exact KL, peak memory beside its inputs (peer: {name})", "MiB",
                     peak | {"peer": peak[name]}, 2**-20)]
    return rows


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most bytes of tensors alive at once while `function` runs, beyond those before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as found:
        function()
    held = most = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def sampler(s: Setup) -> list[Row]:
    """Drawing one token for each of 8 rows at Qwen's vocabulary."""
    logits = torch.randn(8, QWEN_VOCAB, generator=torch.Generator().manual_seed(0))
    logits, uniform = logits.to(s.net.device), torch.rand(8, device=s.net.device)
    sampling = Sampling(1, 0.7)
    t = medians({"ours": lambda: sample(logits, sampling, uniform),
                 "peer": lambda: torch.multinomial((logits / 0.7).softmax(-1), 1)}, 6 * s.repeats)
    return [row("sampler, 8 x 151,936 (peer: torch.multinomial)", "ms", t, 1e3)]


# --------------------------------------------------------------------------------------------------
# Whole runs; only by name, one repetition


def pipeline(s: Setup) -> list[Row]:
    """`train.py --quick` as it is, and once more with its engine, its scoring and its training
    replaced by what transformers and peft offer. Each side goes on with the texts it sampled, so
    the amounts, which are printed, differ a little.
    """
    seconds: dict[str, Counter] = {}
    amounts: dict[str, Counter] = {}
    if s.has_peer:
        peer_generate(s, s.prompts(2), 4, set(), 0.7)  # loaded before the clock runs
        s.peer_lora.train()
    for name, replaced in {"ours": {}, **({"peer": replacements(s)} if s.has_peer else {})}.items():
        with tempfile.TemporaryDirectory() as out, contextlib.ExitStack() as stack:
            for target, new in replaced.items():
                stack.enter_context(mock.patch(target, new))
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
            begun = time.perf_counter()
            status = train.main([*QUICK, "--model", str(s.net.folder), "--out", out,
                                 "--device", str(s.net.device),
                                 "--dtype", str(s.net.dtype).removeprefix("torch.")])
            seconds[name] = Counter({"whole command": time.perf_counter() - begun})
            amounts[name] = Counter()
            if status:
                raise InputError(f"train.py ended with status {status}")
            for line in (Path(out) / "metrics.jsonl").open():
                m = json.loads(line)
                if m["stage"] in STAGES:
                    seconds[name][m["stage"]] += m["seconds"]
                    amounts[name][m["stage"]] += m.get("prompts", m.get("samples", 0))

    rows = []
    for stage in seconds["ours"]:
        name = f"train.py --quick: {stage}"
        counts = [f"{amount[stage]:,} {who}" for who, amount in amounts.items() if amount[stage]]
        if counts:
            name += f" (rows: {', '.join(counts)})"
        rows.append(row(name, "s", {who: t[stage] for who, t in seconds.items() if stage in t}))
    return rows


def replacements(s: Setup) -> dict[str, object]:
    """What an author without this project would write in the place of its parts."""
    class PeerEngine:
        """transformers' generate on batches of 8 prompts of like length."""

        def __init__(self, net: Transformer, sampling: Sampling, stop_ids: set[int]):
            self.sampling, self.stop_ids = sampling, stop_ids
            self.prompt_tokens = self.new_tokens = 0

        def run(self, requests: Sequence[Request], bar: str | None = None) -> Iterator[Output]:
            torch.manual_seed(requests[0].seed if requests else 0)
            for some in by_length([r.ids for r in requests], 8):
                rows = peer_generate(s, [requests[i].ids for i in some],
                                     self.sampling.max_new_tokens, self.stop_ids,
                                     self.sampling.temperature)
                self.prompt_tokens += sum(len(requests[i].ids) for i in some)
                self.new_tokens += sum(map(len, rows))
                for i, ids in zip(some, rows):
                    stop = "eos" if ids[-1] in self.stop_ids else "length"
                    yield Output(i, requests[i], len(ids), ids, stop)

    def read_whole(model: torch.nn.Module, rows: Sequence, batch: int) -> Iterator:
        """The index and the logits or last states of rows read whole, `batch` at a time."""
        for some in by_length(rows, batch):
            ids = pad([rows[i] for i in some], s.net.device)[0]
            yield from zip(some, model(input_ids=ids)[0])

    @torch.inference_mode()
    def log_probabilities(net: Transformer, prompts: Sequence, targets: Sequence,
                          shared: Sequence | None = None, bar: str | None = None,
                          reader: PrefixReader | None = None) -> tuple[list[Tensor], int]:
        """Every row read whole, 8 at a time, the logits of all its tokens."""
        rows = [[*p, *t] for p, t in zip(prompts, targets)]
        found = [None] * len(rows)
        for i, logits in read_whole(s.peer, rows, 8):
            logs = logits[len(prompts[i]) - 1:len(rows[i]) - 1].float().log_softmax(-1)
            ids = torch.tensor(targets[i], device=net.device)[:, None]
            found[i] = logs.gather(1, ids)[:, 0].cpu()
        return found, sum(map(len, rows))

    @torch.inference_mode()
    def states(batch: int, net: Transformer, rows: Sequence, starts: Sequence,
               shared: Sequence | None = None,
               bar: str | None = None) -> tuple[list[Tensor], int]:
        """The last hidden states of rows read whole, `batch` at a time."""
        found = [None] * len(rows)
        for i, states in read_whole(s.peer.model, rows, batch):
            found[i] = states[starts[i]:len(rows[i])].clone()
        return found, sum(map(len, rows))

    def train_lora(run: object, prism: PRISM, samples: Sequence[train.Sample],
                   args: argparse.Namespace) -> None:
        """peft, padded batches, the naive KL of whole logits; ends without handing over A and B."""
        model = s.peer_lora.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], args.lr)
        for step, batch in enumerate(split_chunks(samples, args.batch_size) * args.epochs):
            begun = time.perf_counter()
            logits = model(input_ids=pad([b.ids for b in batch], s.net.device)[0]).logits
            student = torch.cat([logits[i, b.start - 1:len(b.ids) - 1]
                                 for i, b in enumerate(batch)])
            with torch.no_grad():
                target = s.net.head(torch.cat([b.teacher for b in batch]).to(s.net.device))
            loss = naive_kl(student, target) / len(target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.record("lora", step, loss=loss.item(), samples=len(batch), flops=0,
                       tokens_trained=len(target), seconds=time.perf_counter() - begun)

    return {"generate.Engine": PeerEngine,
            "queries.token_log_probabilities": log_probabilities,
            "engine.token_log_probabilities": log_probabilities,
            "judge.token_log_probabilities": log_probabilities,
            "judge.hidden_states": functools.partial(states, 8),
            "train.hidden_states": functools.partial(states, 1),
            "train.train_lora": train_lora}


def profile(s: Setup) -> list[Row]:
    """Where the time of a decoding step and of a training step goes: prints the ten operations (on
    a GPU, kernels) that take most; what is left is launching, copies and waits."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if s.net.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    rows, order = [], f"self_{s.net.device.type}_time_total"
    steps = {"decode step, batch 32, half gated": our_step(s, 32, 16, 200),
             "training step": our_training_step(s)}
    for name, step in steps.items():
        medians({"step": step}, 1)  # warms up
        with torch.profiler.profile(activities=activities) as found:
            whole = medians({"step": step}, 1, warmup=0)["step"]
        events = found.key_averages()
        print(f"{name}\n{events.table(sort_by=order, row_limit=10)}", file=sys.stderr)
        kind = getattr(torch.autograd.DeviceType, s.net.device.type.upper())  # not launches, too
        busy = sum(getattr(e, order.replace("cuda", "device")) for e in events
                   if e.device_type == kind)
        rows.append(Row(f"{name}, profiled (floor: the operations alone)", "ms", 1e3 * whole,
                        floor=busy / 1e3))
    return rows


# --------------------------------------------------------------------------------------------------
# The command


PARTS: dict[str, Callable[[Setup], list[Row]]] = {
    "loading": loading, "generation": generation, "decoding": decoding, "routing": routing,
    "lora": lora, "kl": kl, "sampler": sampler, "pipeline": pipeline, "profile": profile}
BY_NAME = ("pipeline", "profile")  # not in the default set
OF_FILES = ("loading", "pipeline")  # nothing for a --shape


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    def figure(value: float | None) -> str:
        return "-" if value is None else f"{value:,.3g}" if value < 1e3 else f"{value:,.0f}"

    lines = []
    for r in rows:
        over = r.ours / r.floor if r.floor else None
        lines.append([r.part, r.unit, *map(figure, (r.ours, r.peer, r.gain, r.floor, over))])
    return report.table(("part", "unit", "ours", "peer", "times better", "floor", "ours / floor"),
                        lines)


def parser() -> argparse.ArgumentParser:
    """The command line of bench.py."""
    p = Parser(description="Speed and memory beside transformers and peft (optional installs).")
    p.add_argument("--model", default=DEFAULT_MODEL, help="model id or folder; default %(default)s")
    p.add_argument("--shape", metavar="NAME|FILE", help="random weights of a config.json instead; "
                   f"names: {', '.join(sorted(path.stem for path in SHAPES.glob('*.json')))}")
    p.add_argument("--only", help="parts, by comma; default "
                   + ",".join(n for n in PARTS if n not in BY_NAME)
                   + "; only by name: " + ", ".join(BY_NAME))
    p.add_argument("--no-peer", action="store_true", help="measure ours alone")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    p.add_argument("--repeats", type=int, default=5, help="at least; default %(default)s")
    p.add_argument("--device", default="auto", help="auto (default), cpu, cuda, ...")
    p.add_argument("--dtype", default="auto", help="auto (default), bfloat16, float32")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    return exit_status(lambda: _main(parser().parse_args(argv)))


def _main(args: argparse.Namespace) -> int:
    """Measure the chosen parts and print the table."""
    shape = args.shape and Path(args.shape)
    if args.shape and not shape.exists():
        shape = SHAPES / f"{args.shape}.json"
    known = [n for n in PARTS if not (shape and n in OF_FILES)]
    names = [n for n in known if n not in BY_NAME]
    if args.only is not None:
        names = [n for n in args.only.split(",") if n]
    unknown = [n for n in names if n not in known]
    if unknown or not names:
        raise InputError(f"--only {','.join(unknown)}: choose among {', '.join(known)}")
    if args.repeats < 1:
        raise InputError(f"--repeats is {args.repeats}, it must be at least 1")
    if args.json and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise InputError(f"--json {args.json}: not a file in a folder that exists")
    setup, rows = Setup(args.model, args.device, args.dtype, args.repeats, shape,
                        not args.no_peer), []
    if not (args.no_peer or setup.has_peer):
        print("transformers and peft are not installed: no peer", file=sys.stderr)
    machine = {"model": args.shape or args.model, "dtype": str(setup.net.dtype),
               "device": str(setup.net.device), "threads": torch.get_num_threads(),
               "torch": torch.__version__, "machine": platform.machine(), "repeats": args.repeats}
    for name in names:
        print(f"{name} ...", file=sys.stderr)
        rows += PARTS[name](setup)
        if args.json:  # after each part: a rented machine's time may be over before the last
            found = [asdict(r) | {"gain": r.gain} for r in rows]
            write_file(args.json, json.dumps({**machine, "rows": found}, indent=1) + "\n")
    print(", ".join(f"{k} {v}" for k, v in machine.items()) + "\n\n" + table(rows))
    print(f"\npeak memory: {peak_memory() / 2**30:.1f} GiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
