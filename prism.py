"""The method as tensors: a gate after an early layer, one LoRA adapter behind it, and their losses.

PRISM (arXiv 2603.18507) answers a query like this: run the first layers (the paper: one), read the
gate there, and run the remaining layers with the adapter if the gate opens, without it otherwise.
The adapter was distilled from the model itself reading an expert persona, so the persona's gain
comes without its prompt; where the gate stays closed the base model answers, unchanged. No text in
here: prompts come from tokenizer.py, data from bootstrap.py.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora import LoRA
from model import KVCache, Positions, Transformer, load
from support import adapter as files
from support.cpu import cached_rows
from support.device import upload
from support.hub import InputError

KL_CHUNK_ELEMENTS = 20 * 2**20  # logits of one product of the distillation loss: 40 MiB in bf16


class Gate(nn.Module):
    """R(x) = sigmoid(MLP(h(x))), the MLP d -> 128 -> 64 -> 1 with GELU (paper, section 4).

    h is standardised with the training set's mean and deviation, which are stored with the gate:
    raw states separated classes at 0.79 accuracy where standardised ones reached 0.96.
    """

    def __init__(self, width: int, seed: int = 0):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.mlp = nn.Sequential(
                nn.Linear(width, 128), nn.GELU(),
                nn.Linear(128, 64), nn.GELU(),
                nn.Linear(64, 1))

    def forward(self, h: Tensor) -> Tensor:
        """h [B, d] in any dtype -> logits [B] in fp32; the probability is their sigmoid."""
        return self.mlp((h.float() - self.mean) / self.deviation).squeeze(-1)


# --------------------------------------------------------------------------------------------------
# Routing


class Router(nn.Module):
    """A gate and the layers that it reads. On its own, it routes for an adapter served elsewhere.

    Args:
        net: the base, of which only the layers up to the gate's are used here.
        gate_layer: the decoder layer whose output the gate reads; None is no gate.
        gate_pool: "last" (the paper: the prompt's last token) or "mean" (over the user's text).
        seed: of the gate's weights.
    """

    def __init__(self, net: Transformer, gate_layer: int | None, gate_pool: str | None = "last",
                 seed: int = 0):
        super().__init__()
        self.net, self.gate = net, None
        self.gate_layer, self.gate_pool = gate_layer, gate_pool
        self.threshold = 0.5
        self.early_layers = range(0)  # the layers before the decision
        if gate_layer is not None:
            self.gate = Gate(net.config.hidden_size, seed).to(net.device)
            self.early_layers = range(gate_layer + 1)

    def first_layers(self, ids: Tensor, at: Positions) -> Tensor:
        """Embed ids [B, T] and run the layers up to the gate's; [B, T, d]."""
        return self.net.run(self.net.embed(ids), at, self.early_layers)

    def pool(self, x: Tensor, lengths: Tensor, user_mask: Tensor | None) -> Tensor:
        """h(x): the state [B, d] that the gate reads in x [B, T, d], the gate layer's output.

        Args:
            lengths: [B] tokens of each row; the rest is padding.
            user_mask: [B, T] true at the last user message's tokens; needed for "mean" only.
        """
        if self.gate_pool == "last":
            return last_states(x, lengths)
        if user_mask is None:
            raise InputError("a gate that pools by mean needs the user mask of every prompt")
        mask = user_mask.to(x.device, torch.float32)[..., None]  # [B, T, 1]
        return (x.float() * mask).sum(1) / mask.sum(1).clamp(min=1)

    def features(self, ids: Tensor, lengths: Tensor, user_mask: Tensor | None = None) -> Tensor:
        """h(x) of right-padded prompts ids [B, T], as [B, d] fp32: what the gate is trained on."""
        x = self.first_layers(ids, self.net.positions(ids.shape))
        return self.pool(x, lengths, user_mask).float()

    @torch.no_grad()
    def gate_probability(self, ids: Tensor, lengths: Tensor,
                         user_mask: Tensor | None = None) -> Tensor:
        """R(x) [B] of right-padded prompts ids [B, T] with `lengths` [B] tokens each."""
        return self.gate(self.features(ids, lengths, user_mask)).sigmoid()

    def save_gate(self, folder: Path) -> None:
        """Write gate.safetensors: the MLP and the standardisation."""
        files.write_tensors(folder / files.GATE_FILE, self.gate.state_dict())

    def load_gate(self, folder: Path, threshold: float) -> None:
        """Read gate.safetensors of a folder into this gate, which opens from `threshold` on."""
        path = folder / files.GATE_FILE
        found = files.read_tensors(path, self.gate.state_dict())
        if not bool((found["deviation"] > 0).all()):
            raise InputError(f"{path}: a deviation that is not above zero; no gate like this was "
                             "ever trained")
        self.gate.load_state_dict(found)
        self.threshold = threshold


def load_router(folder: Path, device: torch.device | str = "cpu",
                dtype: torch.dtype | None = None) -> Router:
    """The router of a saved adapter: embeddings, the layers up to the gate's and the gate are
    loaded, nothing else (of SmolLM2 a third, of a 7B model a fifth).

    Raises:
        InputError: a broken folder, or a base with other weights than the adapter's.
    """
    settings = files.read_settings(folder)
    name, layer = settings["base_model"], settings["gate_layer"]
    if name is None or layer is None:
        missing = "its base model" if name is None else "a gate"
        raise InputError(f"{folder}: {files.PRISM_FILE} does not name {missing}")
    net = load(name, device, dtype, layers=layer + 1)
    files.check_base(settings, net.name, net.folder, folder)
    router = Router(net, layer, settings["gate_pool"])
    router.load_gate(folder, settings["threshold"])
    return router.eval()


def last_states(x: Tensor, lengths: Tensor) -> Tensor:
    """The state [B, d] of each row's last token, in x [B, T, d] of right-padded rows."""
    return x[torch.arange(x.shape[0], device=x.device), lengths - 1]


@dataclass
class Routed:
    """What `PRISM.prefill` returns, rows ordered gated-first.

    `hidden` [B, d] post-norm state of each row's last token; `order` [B], row i was input row
    order[i]; `k` leading rows are gated; `probability` [B] in input order, None without a gate.
    """

    hidden: Tensor
    order: list[int]
    k: int
    probability: list[float] | None


# --------------------------------------------------------------------------------------------------
# The method


class PRISM(Router):
    """A frozen base model with its gate and its adapter.

    Args:
        net: the base; its weights are shared, never changed.
        rank, alpha: LoRA's, on all seven projections of the layers after the gate.
        gate_layer, gate_pool: as in Router. The gate's layer and all before it have no adapter, so
            what the gate reads is the same with the adapter on or off. Without a gate the adapter
            is on all layers and always on, as PEFT's are.
        dropout: on the LoRA branch, while training.
        seed: of the initial A matrices and of the gate.
    """

    def __init__(self, net: Transformer, rank: int = 16, alpha: float = 32.0,
                 gate_layer: int | None = 0, gate_pool: str | None = "last",
                 dropout: float = 0.05, seed: int = 0):
        layers = len(net.layers)
        if gate_layer is not None and not 0 <= gate_layer < layers - 1:
            raise InputError(f"gate layer {gate_layer} leaves no layer for the adapter: the model "
                             f"has {layers}, so it must be in [0, {layers - 2}]")
        if gate_layer is not None and gate_pool not in ("last", "mean"):
            raise InputError(f"gate_pool {gate_pool!r} is neither 'last' nor 'mean'")
        if rank < 1:
            raise InputError(f"rank {rank} is not positive")
        super().__init__(net, gate_layer, gate_pool, seed)
        self.rank, self.alpha = rank, alpha
        self.late_layers = range(len(self.early_layers), layers)  # the layers behind the decision
        self.adapter = nn.ModuleList(None for _ in range(layers))
        generator = torch.Generator().manual_seed(seed)
        for i in self.late_layers:
            self.adapter[i] = nn.ModuleDict()
            for name, (width, outputs) in net.config.projections.items():
                self.adapter[i][name] = LoRA(width, outputs, rank, alpha / rank, dropout, generator)
        self.adapter.to(net.device)

    def forward(self, ids: Tensor, k: int) -> Tensor:
        """Logits [B, T, V] of right-padded ids [B, T], the adapter on the first k rows."""
        return self.net.head(self.net.hidden(ids, self.adapter, k))

    def prefill(self, ids: Tensor, lengths: Tensor, gate: str, cache: KVCache | None = None,
                user_mask: Tensor | None = None) -> Routed:
        """Read prompts and route them in ONE pass: early layers, gate, reorder, other layers.

        Args:
            ids, lengths, user_mask: as in `gate_probability`; positions start at 0.
            gate: "auto" (the gate decides), "on" or "off" (its probability is still reported).
            cache: filled for all layers, rows in the returned order.
        """
        at = self.net.positions(ids.shape, cache)
        x = self.first_layers(ids, at)
        probability = torch.ones(len(ids), device=x.device)  # without a gate, always on
        if self.gate is not None:
            probability = self.gate(self.pool(x, lengths, user_mask)).sigmoid()
        opened = probability >= {"auto": self.threshold, "on": -torch.inf, "off": torch.inf}[gate]
        # One transfer to the host: k and the order are needed there anyway.
        flags, values = torch.stack((opened.float(), probability)).tolist()
        order = sorted(range(len(flags)), key=lambda i: -flags[i])  # stable: gated rows first
        rows, k = upload(torch.tensor(order), x.device), int(sum(flags))
        if order != list(range(len(order))):
            x, lengths = x[rows], lengths[rows]
            if cache is not None:
                cache.reorder(rows, len(self.early_layers))
        x = self.net.run(x, at, self.late_layers, self.adapter, k)
        hidden = self.net.norm(last_states(x, lengths))
        return Routed(hidden, order, k, None if self.gate is None else values)

    @property
    def weights(self) -> files.Weights:
        """The adapter's masters: (layer, stacked projection) -> A and its Bs."""
        return {(i, name): (lora.A, list(lora.B))
                for i in self.late_layers for name, lora in self.adapter[i].items()}

    def save(self, folder: str | Path) -> None:
        """Write adapter (in PEFT's format), gate and prism.json; each file atomically."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        net = self.net
        settings = files.describe_base(net.name, net.folder)
        gate = dict.fromkeys(files.GATE_FIELDS)
        if self.gate is not None:
            self.save_gate(folder)
            gate = {name: getattr(self, name) for name in files.GATE_FIELDS}
        settings |= {"rank": self.rank, "alpha": self.alpha, **gate,
                     "dtype": str(net.dtype).removeprefix("torch.")}
        files.write_adapter(folder, self.weights, net.config, settings)

    @classmethod
    @torch.no_grad()
    def load(cls, folder: str | Path, net: Transformer) -> "PRISM":
        """Read an adapter folder onto the base it was trained on: ours, or PEFT's, without a gate.

        Raises:
            InputError: a broken or missing file, or another base model (by fingerprint).
        """
        folder = Path(folder)
        settings = files.read_settings(folder)
        files.check_base(settings, net.name, net.folder, folder)
        rank, alpha, weights = files.read_adapter(folder, settings, net.config)
        prism = cls(net, rank, alpha, settings["gate_layer"], settings["gate_pool"])
        for at, (A, Bs) in prism.weights.items():
            A.copy_(weights[at][0])
            for B, found in zip(Bs, weights[at][1], strict=True):
                B.copy_(found)
        if prism.gate is not None:
            prism.load_gate(folder, settings["threshold"])
        return prism.eval()


# --------------------------------------------------------------------------------------------------
# Losses


def gate_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of gate logits [B] against targets [B] in [0, 1], balanced: wins and
    losses weigh the same in all, as if the rarer of the two were drawn more often."""
    won = (targets * F.softplus(-logits)).sum() / targets.sum().clamp(min=1e-6)
    lost = ((1 - targets) * F.softplus(logits)).sum() / (1 - targets).sum().clamp(min=1e-6)
    return (won + lost) / 2


def kl_and_gradient(teacher: Tensor, student: Tensor, temperature: float,
                    cap: float | None) -> tuple[Tensor, Tensor]:
    """T^2 sum_n KL(p_n || q_n) with p, q = softmax(logits / T), and its gradient.

    Args:
        teacher, student: logits z [n, V]; with a `cap` they become cap * tanh(z / cap) first.

    Returns:
        The loss, and its gradient with respect to the student's z, T (q - p), both fp32.
    """
    log_p = scaled_log_softmax(teacher, temperature, cap)
    log_q = scaled_log_softmax(student, temperature, cap)
    p = log_p.exp()
    log_ratio = log_p.sub_(log_q)
    loss = temperature**2 * torch.dot(p.flatten(), log_ratio.flatten())
    gradient = log_q.exp_().sub_(p).mul_(temperature)
    if cap is not None:  # d cap tanh(z / cap) / dz = 1 - tanh(z / cap)^2
        gradient -= gradient * (student.to(gradient.dtype) / cap).tanh().square()
    return loss, gradient


def scaled_log_softmax(logits: Tensor, temperature: float, cap: float | None) -> Tensor:
    """log softmax(logits / T), at least in fp32, of soft-capped logits if there is a cap."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if cap is not None:
        z = (z / cap).tanh() * cap
    if temperature != 1:
        z = z / temperature
    return F.log_softmax(z, dim=-1)


class LinearKL(torch.autograd.Function):
    """Forward KL between two linear heads, summed over tokens, a chunk of logits at a time:

        L = T^2 sum_n KL( softmax(W t_n / T) || softmax(W s_n / T) )
        dL / ds_n = T (softmax(W s_n / T) - softmax(W t_n / T)) W

    The full [N, V] logits would be the largest tensor of the whole training step. Here each chunk's
    logits are made, used for the loss AND for the student's gradient, and dropped; only the
    gradient with respect to the student's hidden states [N, d] is kept.
    """

    @staticmethod
    def forward(ctx, student, teacher, weight, temperature, cap=None):
        """student, teacher [N, d], weight [V, d] -> L; with a `cap` the logits z = W h become
        cap * tanh(z / cap) first (Gemma 2)."""
        gradient = torch.empty_like(student)
        wide = torch.promote_types(student.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=student.device)
        size = max(1, KL_CHUNK_ELEMENTS // len(weight))
        part = cached_rows(size, len(weight), student.device)
        for s, t, out in zip(student.split(size), teacher.split(size), gradient.split(size)):
            both = torch.cat((t, s)) @ weight.t()  # [2 n, V]: the head is read once
            teacher_logits, student_logits = both.chunk(2)
            for z_t, z_s in zip(teacher_logits.split(part), student_logits.split(part)):
                loss, dz_s = kl_and_gradient(z_t, z_s, temperature, cap)
                total += loss
                z_s.copy_(dz_s)  # the gradient takes the place of the logits
            torch.mm(student_logits, weight, out=out)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, grad):
        """Scale the stored gradient; nothing flows to the teacher or the head."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype), None, None, None, None


def distill_loss(student: Tensor, teacher: Tensor, net: Transformer,
                 temperature: float = 1.0) -> Tensor:
    """Summed forward KL( P(.|persona, x, y_<t) || P_lora(.|x, y_<t) ) over answer tokens.

    Args:
        student: [N, d] post-norm hidden states at the positions that predict the answer tokens,
            read WITHOUT the persona, adapter on.
        teacher: [N, d] the same of the base model, read WITH the persona.
        temperature: softens both; the loss is scaled by its square (Hinton et al. 2015).
    """
    return LinearKL.apply(student, teacher, net.lm_head, temperature, net.config.final_cap)


def answer_loss(student: Tensor, answers: Tensor, net: Transformer) -> Tensor:
    """Summed cross-entropy of answer ids [N] under the student's states [N, d], as in
    `distill_loss`: supervised fine-tuning, which PRISM is compared with.

    Each chunk of logits is made again for the backward pass, so that one at a time is held.
    """
    def chunk(states: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(net.head(states).float(), ids, reduction="sum")

    size = max(1, KL_CHUNK_ELEMENTS // 4 // net.lm_head.shape[0])  # fp32, and its gradient
    return sum(checkpoint(chunk, states, ids, use_reentrant=False)
               for states, ids in zip(student.split(size), answers.split(size)))
