"""The method as tensors: a gate after an early layer, one LoRA adapter behind it, and their losses.

PRISM (arXiv 2603.18507) answers a query like this: run the first decoder layer, read the gate at
the last token of the prompt, and run the remaining layers with the adapter if the gate opens,
without it otherwise. The adapter was distilled from the model itself reading an expert persona, so
the persona's gain comes without its prompt; where the gate stays closed the base model answers,
unchanged. No text in here: prompts come from tokenizer.py, data from bootstrap.py.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from support.hub import ADAPTER_FILES, InputError, base_source, check_file, read_json, write_file
from lora import LoRA
from model import Block, KVCache, Span, Transformer, fingerprint, load, parts, upload

KL_CHUNK_ELEMENTS = 20 * 2**20  # logits of one product of the distillation loss: 40 MiB in bf16
KL_BLOCK_ELEMENTS = 5 * 2**17  # of these, worked on at once in fp32 on a CPU: 2.5 MiB
ADAPTER_FILE, PEFT_FILE, GATE_FILE, PRISM_FILE = ADAPTER_FILES
# Settings of a PEFT adapter that change what it computes, and the values that do not. Those ways to
# initialise that are missing here change the base's own weights.
PEFT_NEUTRAL = {"peft_type": ("LORA",), "bias": (None, "none"), "modules_to_save": (None, []),
                "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
                **{name: (None, False, [], {}) for name in (
                    "use_dora", "lora_bias", "fan_in_fan_out", "layer_replication", "use_qalora",
                    "trainable_token_indices", "alora_invocation_tokens", "target_parameters",
                    "use_bdlora", "arrow_config", "kasa_config", "velora_config",
                    "monteclora_config")}}


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
            self.mlp = nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, 64),
                                     nn.GELU(), nn.Linear(64, 1))

    def forward(self, h: Tensor) -> Tensor:
        """h [B, d] in any dtype -> logits [B] in fp32; the probability is their sigmoid."""
        return self.mlp((h.float() - self.mean) / self.deviation).squeeze(-1)


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


def pool(x: Tensor, lengths: Tensor, user_mask: Tensor | None, kind: str) -> Tensor:
    """What a gate reads, [B, d], of its layer's output x [B, T, d] (see PRISM.pool)."""
    if kind == "last":
        return x[torch.arange(x.shape[0], device=x.device), lengths - 1]
    if user_mask is None:
        raise InputError("a gate that pools by mean needs the user mask of every prompt")
    mask = user_mask.to(x.device, torch.float32)[..., None]  # [B, T, 1]
    return (x.float() * mask).sum(1) / mask.sum(1).clamp(min=1)


class Router:
    """The gate alone, for an adapter that is served elsewhere: embeddings, the layers up to the
    gate's, and the gate are loaded, nothing else (of SmolLM2 a third, of a 7B model a fifth).

    Raises:
        InputError: a broken folder, or a base with other weights than the adapter's.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu",
                 dtype: torch.dtype | None = None):
        folder = Path(folder)
        raw = read_settings(folder)
        if raw["base_model"] is None:
            raise InputError(f"{folder}: prism.json does not name its base model")
        self.net = load(raw["base_model"], device, dtype, layers=raw["gate_layer"] + 1)
        check_base(raw, self.net, folder)
        self.kind, self.threshold = raw["gate_pool"], raw["threshold"]
        self.gate = Gate(self.net.config.hidden_size).to(self.net.device)
        load_gate(self.gate, folder, raw["sha256"].get(GATE_FILE))

    @torch.inference_mode()
    def probability(self, ids: Tensor, lengths: Tensor, user_mask: Tensor | None) -> Tensor:
        """R(x) [B], as `PRISM.gate_probability`."""
        x = self.net.run(self.net.embed(ids), self.net.span(ids.shape),
                         range(len(self.net.layers)))
        return self.gate(pool(x, lengths, user_mask, self.kind)).sigmoid()


class PRISM(nn.Module):
    """A frozen base model with its gate and its adapter.

    Args:
        net: the base; its weights are shared, never changed.
        rank, alpha: LoRA's, on all seven projections of the layers after the gate.
        gate_layer: the decoder layer whose output the gate reads; it and all before it have no
            adapter, so what the gate reads is the same whether the adapter is on or off.
        gate_pool: "last" (the paper: the prompt's last token) or "mean" (over the user's text).
        dropout: on the LoRA branch, while training.
        seed: of the initial A matrices and of the gate.
    """

    def __init__(self, net: Transformer, rank: int = 16, alpha: float = 32.0, gate_layer: int = 0,
                 gate_pool: str = "last", dropout: float = 0.05, seed: int = 0):
        super().__init__()
        layers, width = len(net.layers), net.config.hidden_size
        if not 0 <= gate_layer < layers - 1:
            raise InputError(f"gate layer {gate_layer} leaves no layer for the adapter: the model "
                             f"has {layers}, so it must be in [0, {layers - 2}]")
        if gate_pool not in ("last", "mean"):
            raise InputError(f"gate_pool {gate_pool!r} is neither 'last' nor 'mean'")
        if rank < 1:
            raise InputError(f"rank {rank} is not positive")
        self.net, self.rank, self.alpha = net, rank, alpha
        self.gate_layer, self.gate_pool, self.threshold = gate_layer, gate_pool, 0.5
        self.gate = Gate(width, seed).to(net.device)
        self.adapter = nn.ModuleList(
            None if i <= gate_layer else _layer_lora(block, rank, alpha / rank, dropout)
            for i, block in enumerate(net.layers)).to(net.device)
        generator = torch.Generator().manual_seed(seed)
        for module in self.adapter.modules():
            if isinstance(module, LoRA):
                module.reset(generator)

    def forward(self, ids: Tensor, k: int) -> Tensor:
        """Logits [B, T, V] of right-padded ids [B, T], the adapter on the first k rows."""
        return self.net.head(self.net.hidden(ids, self.adapter, k))

    # -- routing -----------------------------------------------------------------------------------

    def first_layers(self, ids: Tensor, span: Span) -> Tensor:
        """Embed ids [B, T] and run the layers up to the gate's; [B, T, d]."""
        return self.net.run(self.net.embed(ids), span, range(self.gate_layer + 1))

    def pool(self, x: Tensor, lengths: Tensor, user_mask: Tensor | None) -> Tensor:
        """h(x): the state [B, d] that the gate reads in x [B, T, d], the gate layer's output.

        Args:
            lengths: [B] tokens of each row; the rest is padding.
            user_mask: [B, T] true at the last user message's tokens; needed for "mean" only.
        """
        return pool(x, lengths, user_mask if self.gate_pool == "mean" else None, self.gate_pool)

    def features(self, ids: Tensor, lengths: Tensor, user_mask: Tensor | None = None) -> Tensor:
        """h(x) of right-padded prompts ids [B, T], as [B, d] fp32: what the gate is trained on."""
        x = self.first_layers(ids, self.net.span(ids.shape))
        return self.pool(x, lengths, user_mask).float()

    def gate_probability(self, ids: Tensor, lengths: Tensor,
                         user_mask: Tensor | None = None) -> Tensor:
        """R(x) [B] of right-padded prompts ids [B, T] with `lengths` [B] tokens each."""
        with torch.no_grad():
            return self.gate(self.features(ids, lengths, user_mask)).sigmoid()

    def prefill(self, ids: Tensor, lengths: Tensor, gate: str, cache: KVCache | None = None,
                user_mask: Tensor | None = None) -> Routed:
        """Read prompts and route them in ONE pass: early layers, gate, reorder, other layers.

        Args:
            ids, lengths, user_mask: as in `gate_probability`; positions start at 0.
            gate: "auto" (the gate decides), "on" or "off" (its probability is still reported).
            cache: filled for all layers, rows in the returned order.
        """
        span = self.net.span(ids.shape, cache)
        x = self.first_layers(ids, span)
        probability = self.gate(self.pool(x, lengths, user_mask)).sigmoid()
        opened = {"auto": probability >= self.threshold, "on": torch.ones_like(probability) > 0,
                  "off": torch.zeros_like(probability) > 0}[gate]
        # One transfer to the host: k and the order are needed there anyway.
        flags, values = torch.stack((opened.float(), probability)).tolist()
        order = sorted(range(len(flags)), key=lambda i: -flags[i])  # stable: gated rows first
        rows, k = upload(torch.tensor(order), x.device), int(sum(flags))
        if order != list(range(len(order))):
            x, lengths = x[rows], lengths[rows]
            if cache is not None:
                cache.reorder(rows, self.gate_layer + 1)
        layers = range(self.gate_layer + 1, len(self.net.layers))
        x = self.net.run(x, span, layers, self.adapter, k)
        last = x[torch.arange(x.shape[0], device=x.device), lengths - 1]
        return Routed(self.net.norm(last), order, k, values if self.gate_layer >= 0 else None)

    # -- files -------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write adapter (in PEFT's format), gate and prism.json; each file atomically.

        The fp32 masters are written, with the projections that are stacked here split again. Where
        the base has them fused (Phi-3), one module of PEFT's has the rank and the alpha of all its
        parts, so that alpha / rank stays what it is.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        net, adapted = self.net, [i for i, lora in enumerate(self.adapter) if lora is not None]
        is_folder = net.name is not None and Path(net.name).is_dir()
        base = str(Path(net.name).resolve()) if is_folder else net.name
        names = {stack: [n.split(".")[1] for n in found] for stack, found in
                 parts(net.config).items()}
        fused = {n: len(linear.out_features) for stack, linear in net.layers[0].linears.items()
                 for n in names[stack] if len(names[stack]) < len(linear.out_features)}
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
            "r": self.rank, "lora_alpha": self.alpha, "lora_dropout": 0.0, "bias": "none",
            "fan_in_fan_out": False, "inference_mode": True, "use_rslora": False,
            "use_dora": False, "layers_to_transform": adapted, "layers_pattern": "layers",
            "target_modules": [n for found in names.values() for n in found],
            "rank_pattern": {n: p * self.rank for n, p in fused.items()},
            "alpha_pattern": {n: p * self.alpha for n, p in fused.items()}}
        prism = {
            "base_model": base, "base_source": base_source(net.folder, net.name) if base else None,
            "base_fingerprint": fingerprint(net.folder) if base else None, "rank": self.rank,
            "alpha": self.alpha, "gate_layer": self.gate_layer, "gate_pool": self.gate_pool,
            "threshold": self.threshold, "dtype": str(net.dtype).removeprefix("torch."),
            # so that a damaged file, or the gate of another adapter, is not taken for this one's
            "sha256": {ADAPTER_FILE: write_tensors(folder / ADAPTER_FILE, self._adapter_tensors()),
                       GATE_FILE: self.save_gate(folder)}}
        write_file(folder / PEFT_FILE, json.dumps(config, indent=1) + "\n")
        write_file(folder / PRISM_FILE, json.dumps(prism, indent=1) + "\n")

    def save_gate(self, folder: Path) -> str:
        """Write gate.safetensors: the MLP and the standardisation; returns its SHA-256."""
        return write_tensors(folder / GATE_FILE, self.gate.state_dict())

    def load_gate(self, folder: Path, sha256: str | None = None) -> None:
        """Read gate.safetensors of a folder into this gate."""
        load_gate(self.gate, folder, sha256)

    def _adapter_modules(self) -> Iterator[tuple[LoRA, list[str]]]:
        """Every LoRA with the names of its parts in PEFT's file."""
        for i, layer in enumerate(self.adapter):
            for stack, names in parts(self.net.config).items() if layer is not None else ():
                yield layer[stack], [f"base_model.model.model.layers.{i}.{n}" for n in names]

    def _adapter_tensors(self) -> dict[str, Tensor]:
        """PEFT's tensor names -> our A and B; those of a fused projection as one block-diagonal."""
        named = {}
        for lora, names in self._adapter_modules():
            if len(names) == len(lora.B):
                found = zip(names, lora.A.split(lora.rank), lora.B)
            else:
                found = [(names[0], lora.A, torch.block_diag(*lora.B))]
            for at, a, b in found:
                named[f"{at}.lora_A.weight"], named[f"{at}.lora_B.weight"] = a, b
        return named

    @torch.no_grad()
    def _copy_adapter(self, found: dict[str, Tensor], path: Path) -> None:
        """Copy tensors named as in `_adapter_tensors` into A and B."""
        for lora, names in self._adapter_modules():
            lora.A.copy_(torch.cat([found[f"{at}.lora_A.weight"] for at in names]))
            # Split or fused, this is the same matrix, [sum o_i, p * r].
            whole = torch.block_diag(*(found[f"{at}.lora_B.weight"] for at in names))
            row = 0
            for i, b in enumerate(lora.B):
                part = whole[row:row + len(b), i * lora.rank:(i + 1) * lora.rank]
                b.copy_(part)
                part.zero_()
                row += len(b)
            if whole.any():
                raise InputError(f"{path}: {names[0]}.lora_B is not block-diagonal")

    @classmethod
    def load(cls, folder: str | Path, net: Transformer) -> "PRISM":
        """Read an adapter folder onto the base it was trained on: ours, or PEFT's (`from_peft`).

        Raises:
            InputError: a broken or missing file, or another base model (by fingerprint).
        """
        folder = Path(folder)
        if only_peft(folder):
            return cls.from_peft(folder, net)
        raw = read_settings(folder)
        check_base(raw, net, folder)
        # Read first: a rank that is not the tensors' is refused before anything has its size.
        path = folder / ADAPTER_FILE
        found = read_tensors(path, raw["sha256"].get(ADAPTER_FILE))
        ranks = {len(t) for n, t in found.items() if n.endswith("lora_A.weight") and t.ndim}
        if ranks and raw["rank"] not in ranks:  # of a fused projection, A has that of its parts
            raise InputError(f"{folder / PRISM_FILE}: rank is {raw['rank']}, but {ADAPTER_FILE} "
                             f"has rank {', '.join(map(str, sorted(ranks)))}")
        try:
            prism = cls._empty(net, raw["rank"], raw["alpha"], raw["gate_layer"], raw["gate_pool"])
        except InputError as error:
            raise InputError(f"{folder / PRISM_FILE}: {error}") from None
        prism.threshold = raw["threshold"]
        prism._copy_adapter(matching(found, prism._adapter_tensors(), path), path)
        prism.load_gate(folder, raw["sha256"].get(GATE_FILE))
        return prism.eval()

    @classmethod
    def _empty(cls, net: Transformer, rank: int, alpha: float, gate_layer: int,
               gate_pool: str = "last") -> "PRISM":
        """To be read into. Beside the constructor's gate layers there is -1: an adapter from
        elsewhere may be on layer 0, too."""
        prism = cls(net, rank, alpha, 0 if gate_layer == -1 else gate_layer, gate_pool)
        if gate_layer == -1:
            first = _layer_lora(net.layers[0], rank, alpha / rank, 0.0).to(net.device)
            prism.gate_layer, prism.adapter[0] = -1, first
        return prism

    @classmethod
    @torch.no_grad()
    def from_peft(cls, folder: str | Path, net: Transformer) -> "PRISM":
        """A LoRA that PEFT trained elsewhere. No gate came with it, so that it is always open.

        Modules of lower rank than the highest are padded with zeros, missing ones are zeros, and
        what their scales (alpha / rank, or alpha / sqrt(rank)) differ by goes into B.

        Raises:
            InputError: a broken file, or something in it that is not computed here, by name.
        """
        modules = read_peft(Path(folder), net)
        rank, scale = max(len(a) for a, _, _ in modules.values()), next(iter(modules.values()))[2]
        layer = min(int(name.split(".layers.")[1].split(".")[0]) for name in modules)
        prism = cls._empty(net, rank, scale * rank, layer - 1)
        prism.threshold = 0.0
        for lora, names in prism._adapter_modules():
            for p in lora.parameters():
                p.zero_()
            found = [modules.get(name) for name in names]
            if len(names) < len(lora.B) and found[0]:  # fused: each part reads the same A
                a, b, s = found[0]
                found = [(a, part, s) for part in b.split([len(b) for b in lora.B])]
            for i, part in enumerate(found):
                if part:
                    a, b, s = part
                    lora.A[i * rank:i * rank + len(a)] = a
                    lora.B[i][:, :len(a)] = b * (s / lora.scale)
        return prism.eval()


def only_peft(folder: Path) -> bool:
    """Whether an adapter folder is PEFT's own: its config is there, and neither of our files."""
    return ((folder / PEFT_FILE).is_file() and not (folder / PRISM_FILE).exists()
            and not (folder / GATE_FILE).exists())


def read_peft(folder: Path, net: Transformer) -> dict[str, tuple[Tensor, Tensor, float]]:
    """PEFT's module name -> A [r, d], B [o, r] and the scale of their product."""
    config, path = read_json(folder / PEFT_FILE), folder / ADAPTER_FILE
    for name, neutral in PEFT_NEUTRAL.items():
        if config.get(name, neutral[0]) not in neutral:
            raise InputError(f"{folder / PEFT_FILE}: {name} = {str(config[name])[:60]} is not "
                             "supported")
    pattern = config.get("alpha_pattern") or {}
    if not all(isinstance(a, (int, float)) for a in (config.get("lora_alpha"), *pattern.values())):
        raise InputError(f"{folder / PEFT_FILE}: lora_alpha is not a number")
    shapes = {f"base_model.model.model.layers.{i}.{name}": (
                  linear.in_features, linear.out_features[at] if len(names) > 1
                  else sum(linear.out_features))
              for i, layer in enumerate(net.layers) for stack, linear in layer.linears.items()
              for names in [parts(net.config)[stack]] for at, name in enumerate(names)}
    found, modules = read_tensors(path), {}
    for name in found:
        module, _, half = name.rpartition(".lora_")
        if module not in shapes or half not in ("A.weight", "B.weight"):
            raise InputError(f"{path}: {name} is not a LoRA of one of the base's projections")
        a, b = (found.get(f"{module}.lora_{half}.weight") for half in "AB")
        if a is None or b is None or (a.shape[1:], b.shape) != (
                shapes[module][:1], (shapes[module][1], len(a))):
            raise InputError(f"{path}: the A and B of {module} are {a if a is None else a.shape} "
                             f"and {b if b is None else b.shape}, expected [r, {shapes[module][0]}]"
                             f" and [{shapes[module][1]}, r]")
        alpha = next((value for key, value in pattern.items()
                      if re.match(rf"(.*\.)?({key})$", module)), config["lora_alpha"])
        modules[module] = a, b, alpha / (len(a)**0.5 if config.get("use_rslora") else len(a))
    if not modules:
        raise InputError(f"{path}: no LoRA in it")
    return modules


def check_base(raw: dict, net: Transformer, folder: Path) -> None:
    """Raise InputError if the adapter of prism.json `raw` was trained on other weights."""
    if raw["base_fingerprint"] and net.folder and (
            raw["base_fingerprint"] != fingerprint(net.folder)):
        raise InputError(f"{folder}: the adapter was trained on {raw['base_model']} "
                         f"({raw['base_source']}), not on {net.name}; their weights differ")


def read_settings(folder: Path) -> dict:
    """prism.json of an adapter folder, its fields checked for presence and type; of PEFT's own
    folder what corresponds to it."""
    path = folder / PRISM_FILE
    if not folder.is_dir():
        raise InputError(f"{folder}: no such adapter folder")
    if only_peft(folder):
        config = read_json(folder / PEFT_FILE)
        return {"base_model": config.get("base_model_name_or_path"), "base_fingerprint": None,
                "base_source": None, "rank": config.get("r"), "alpha": config.get("lora_alpha"),
                "gate_layer": -1, "gate_pool": "last", "threshold": 0.0, "sha256": {}}
    raw = read_json(path)
    types = {"base_model": (str, type(None)), "base_source": (str, type(None)),
             "base_fingerprint": (str, type(None)), "rank": int, "alpha": (int, float),
             "gate_layer": int, "gate_pool": str, "threshold": (int, float)}
    for name, kind in types.items():
        if name not in raw or not isinstance(raw[name], kind) or isinstance(raw[name], bool):
            raise InputError(f"{path}: field {name!r} is missing or has the wrong type")
    for name, low, high in (("rank", 1, 10**4), ("alpha", 1e-9, 1e9), ("gate_layer", -1, 10**4),
                            ("threshold", 0, 1)):  # layer -1: PEFT's, which may adapt layer 0
        if not low <= raw[name] <= high:  # also refuses NaN, which would close every gate
            raise InputError(f"{path}: {name} is {str(raw[name])[:40]}, it must be in [{low:g}, "
                             f"{high:g}]")
    if raw["gate_pool"] not in ("last", "mean"):
        raise InputError(f"{path}: gate_pool is {raw['gate_pool']!r:.40}, neither last nor mean")
    if not isinstance(raw.setdefault("sha256", {}), dict):  # older adapters have none
        raise InputError(f"{path}: field 'sha256' has the wrong type")
    return raw


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a small safetensors file; returns its SHA-256."""
    data = to_safetensors({n: t.detach().cpu().contiguous() for n, t in tensors.items()},
                          {"format": "pt"})
    write_file(path, data)
    return hashlib.sha256(data).hexdigest()


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """All tensors of a small safetensors file; InputError if it is not a readable one, or not the
    one with this SHA-256."""
    check_file(path)
    data = path.read_bytes()
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise InputError(f"{path}: not as it was written (its SHA-256 is another); restore it or "
                         f"train again, or take sha256 out of {PRISM_FILE} if the change is meant")
    try:
        return parse_safetensors(data)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None


def load_gate(gate: Gate, folder: Path, sha256: str | None = None) -> None:
    """Read gate.safetensors of a folder, which has this SHA-256 if one is given, into a gate."""
    path, targets = folder / GATE_FILE, gate.state_dict()
    found = matching(read_tensors(path, sha256), targets, path)
    if not bool((found["deviation"] > 0).all()):
        raise InputError(f"{path}: a deviation that is not above zero; no gate like this was "
                         "ever trained")
    gate.load_state_dict(found)


def matching(found: dict[str, Tensor], targets: dict[str, Tensor],
             path: Path) -> dict[str, Tensor]:
    """What was read from `path`, whose names and shapes must be exactly those of `targets`."""
    if found.keys() != targets.keys():
        raise InputError(f"{path}: tensor {sorted(found.keys() ^ targets.keys())[0]} is missing or "
                         "unexpected")
    for name, target in targets.items():
        if found[name].shape != target.shape:
            raise InputError(f"{path}: {name} is {list(found[name].shape)}, expected "
                             f"{list(target.shape)}")
        if not found[name].is_floating_point() or not bool(found[name].isfinite().all()):
            raise InputError(f"{path}: {name} is not floating point, or holds NaN or infinity")
    return found


def _layer_lora(block: Block, rank: int, scale: float, dropout: float) -> nn.ModuleDict:
    """Fresh LoRA modules for the four stacked linears of one decoder layer."""
    return nn.ModuleDict({name: LoRA(linear.in_features, linear.out_features, rank, scale, dropout)
                          for name, linear in block.linears.items()})


# --------------------------------------------------------------------------------------------------
# Losses


def gate_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy of gate logits [B] against t(x) in [0, 1], shape [B]."""
    return F.binary_cross_entropy_with_logits(logits, targets)


class LinearKL(torch.autograd.Function):
    """Forward KL between two linear heads, summed over tokens, a chunk of logits at a time.

    The full [N, V] logits would be the largest tensor of the whole training step. Here each chunk's
    logits are made, used for the loss AND for the student's gradient, and dropped; only the
    gradient with respect to the student's hidden states [N, d] is kept. Between the products the
    logits are worked on in fp32, on a CPU a few rows at a time, in buffers that all rows share and
    that stay in its caches (256 tokens at V = 151,936: 270 ms; with buffers of 48 rows 475).
    """

    @staticmethod
    def forward(ctx, student, teacher, weight, temperature, cap=None):
        """student, teacher [N, d], weight [V, d] -> T^2 sum_n KL(teacher_n || student_n); with a
        `cap` the logits z = W h become cap * tanh(z / cap) first (Gemma 2)."""
        wide = torch.promote_types(student.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=student.device)
        gradient = torch.empty_like(student)
        chunk = min(max(1, KL_CHUNK_ELEMENTS // weight.shape[0]), max(1, len(student)))
        # On a GPU all at once: a launch costs more there than caches save.
        block = chunk if student.is_cuda else max(1, KL_BLOCK_ELEMENTS // weight.shape[0])
        both = student.new_empty(2 * chunk, weight.shape[0])  # the teacher's logits, the student's
        buffers = [both.new_empty(block, weight.shape[0], dtype=wide) for _ in range(3)]
        for i in range(0, len(student), chunk):
            rows = slice(i, min(i + chunk, len(student)))
            n = rows.stop - i
            # One product for both: the head is read once.
            torch.mm(torch.cat((teacher[rows], student[rows])), weight.t(), out=both[:2 * n])
            for expected, logits in zip(both[:n].split(block), both[n:2 * n].split(block)):
                p, q, log_ratio = (b[:len(logits)] for b in buffers)
                for given, logs in ((expected, p), (logits, q)):
                    logs.copy_(given)
                    if cap is not None:
                        logs.div_(cap).tanh_().mul_(cap)
                    if temperature != 1:
                        logs.div_(temperature)
                    torch.log_softmax(logs, dim=-1, out=logs)  # row by row, so in place is safe
                torch.sub(p, q, out=log_ratio)
                p.exp_(), q.exp_()
                total += torch.dot(p.flatten(), log_ratio.flatten())
                # d KL / d logits = (q - p) / T, times the T^2 of the loss
                q.sub_(p)
                if temperature != 1:
                    q.mul_(temperature)
                if cap is not None:  # d cap tanh(z / cap) / dz = 1 - tanh(z / cap)^2
                    slope = log_ratio.copy_(logits).div_(cap).tanh_().square_()
                    q.sub_(slope.mul_(q))
                logits.copy_(q)
            torch.mm(both[n:2 * n], weight, out=gradient[rows])
        ctx.save_for_backward(gradient)
        return total * temperature**2

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
