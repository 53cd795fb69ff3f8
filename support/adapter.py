"""The files of an adapter folder: PEFT's two, prism.json and the gate's; names, tensors, settings.

An adapter is handled here as `Weights`: the A and the B matrices of each stacked projection of each
adapted layer. PEFT has a module for each projection instead, so that reading joins what writing
splits. An adapter that PEFT trained elsewhere is read into the same shape; it has no gate.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from support.checkpoint import fingerprint, part_widths, parts
from support.config import Config
from support.hub import ADAPTER_FILES, InputError, base_source, check_file, read_json, write_file

ADAPTER_FILE, PEFT_FILE, GATE_FILE, PRISM_FILE = ADAPTER_FILES
# (layer, stacked projection) -> A [p * r, d] and, for each of its p projections, B [o_i, r]
Weights = dict[tuple[int, str], tuple[Tensor, list[Tensor]]]
# Settings of a PEFT adapter that change what it computes, and the values that do not. Those ways to
# initialise that are missing here change the base's own weights.
PEFT_NEUTRAL = {"peft_type": ("LORA",), "bias": (None, "none"), "modules_to_save": (None, []),
                "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
                **{name: (None, False, [], {}) for name in (
                    "use_dora", "lora_bias", "fan_in_fan_out", "layer_replication", "use_qalora",
                    "trainable_token_indices", "alora_invocation_tokens", "target_parameters",
                    "use_bdlora", "arrow_config", "kasa_config", "velora_config",
                    "monteclora_config")}}
# Fields of prism.json and their types; those of the gate are all null if there is none.
FIELDS = {"base_model": (str, type(None)), "base_source": (str, type(None)),
          "base_fingerprint": (str, type(None)), "rank": int, "alpha": (int, float)}
GATE_FIELDS = {"gate_layer": int, "gate_pool": str, "threshold": (int, float)}
RANGES = {"rank": (1, 10**4), "alpha": (1e-9, 1e9), "gate_layer": (0, 10**4), "threshold": (0, 1)}


# --------------------------------------------------------------------------------------------------
# Names and shapes


def module_names(config: Config, layer: int) -> dict[str, list[str]]:
    """Our stacked projections of a layer -> the names of their parts in PEFT's files."""
    at = f"base_model.model.model.layers.{layer}"
    return {stack: [f"{at}.{name}" for name in names] for stack, names in parts(config).items()}


def module_widths(config: Config) -> dict[str, tuple[int, int]]:
    """PEFT's name of every module that can have a LoRA -> its input and output width."""
    found = {}
    for layer in range(config.num_layers):
        for stack, names in module_names(config, layer).items():
            width, outputs = config.projections[stack][0], part_widths(config, stack)
            found |= {name: (width, output) for name, output in zip(names, outputs)}
    return found


def zero_weights(config: Config, rank: int, first_layer: int,
                 device: str | torch.device = "cpu") -> Weights:
    """An adapter of this shape on every layer from `first_layer` on, all zeros."""
    found: Weights = {}
    for layer in range(first_layer, config.num_layers):
        for stack, (width, outputs) in config.projections.items():
            A = torch.zeros(len(outputs) * rank, width, device=device)
            found[layer, stack] = A, [torch.zeros(o, rank, device=device) for o in outputs]
    return found


def to_peft(weights: Weights, config: Config) -> dict[str, Tensor]:
    """PEFT's tensors. Where the base has projections fused (Phi-3), one module has the rank of all
    of its parts together, and a block-diagonal B."""
    named = {}
    for (layer, stack), (A, Bs) in weights.items():
        names = module_names(config, layer)[stack]
        if len(names) < len(Bs):
            Bs = [torch.block_diag(*Bs)]
        for name, a, b in zip(names, A.chunk(len(Bs)), Bs):
            named[f"{name}.lora_A.weight"] = a
            named[f"{name}.lora_B.weight"] = b
    return named


def from_peft(found: dict[str, Tensor], shaped: Weights, config: Config, path: Path) -> Weights:
    """The inverse of `to_peft`, for tensors whose names and shapes are those of `shaped`."""
    weights: Weights = {}
    for (layer, stack), (_, Bs) in shaped.items():
        names = module_names(config, layer)[stack]
        A = torch.cat([found[f"{name}.lora_A.weight"] for name in names])
        # Split or fused, this is the same matrix, [sum o_i, p * r].
        whole = torch.block_diag(*(found[f"{name}.lora_B.weight"] for name in names))
        blocks = []
        for i, rows in enumerate(whole.split([len(B) for B in Bs])):
            rank = Bs[i].shape[1]
            blocks.append(rows[:, i * rank:(i + 1) * rank])
        if not torch.equal(torch.block_diag(*blocks), whole):
            raise InputError(f"{path}: {names[0]}.lora_B is not block-diagonal")
        weights[layer, stack] = A, blocks
    return weights


# --------------------------------------------------------------------------------------------------
# Our own folders


def write_adapter(folder: Path, weights: Weights, rank: int, alpha: float, config: Config,
                  base: str | None) -> None:
    """Write PEFT's two files for the base model of this name; fp32, each file atomically.

    A fused module has the alpha of all its parts, too, so that alpha / rank stays what it is.
    """
    fused = {}
    for stack, names in parts(config).items():
        count = len(config.projections[stack][1])
        if len(names) < count:
            fused[names[0].split(".")[1]] = count
    targets = [name.split(".")[1] for names in parts(config).values() for name in names]
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base,
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "use_rslora": False, "use_dora": False,
        "layers_to_transform": sorted({layer for layer, _ in weights}), "layers_pattern": "layers",
        "target_modules": targets,
        "rank_pattern": {name: count * rank for name, count in fused.items()},
        "alpha_pattern": {name: count * alpha for name, count in fused.items()}}
    write_tensors(folder / ADAPTER_FILE, to_peft(weights, config))
    write_file(folder / PEFT_FILE, json.dumps(settings, indent=1) + "\n")


def read_adapter(folder: Path, config: Config) -> tuple[int, float, Weights]:
    """Rank, alpha and weights of an adapter folder, ours or PEFT's own.

    Raises:
        InputError: a broken file, or something in it that does not fit the base, by name.
    """
    if only_peft(folder):
        return read_peft(folder, config)
    path, settings = folder / ADAPTER_FILE, read_settings(folder)
    rank, layer = settings["rank"], settings["gate_layer"]
    if layer is not None and layer >= config.num_layers - 1:
        raise InputError(f"{folder / PRISM_FILE}: gate_layer is {layer}, but the base has "
                         f"{config.num_layers} layers")
    found = read_tensors(path)
    # Before anything of its size is made; of a fused projection, A has the rank of all its parts.
    ranks = {len(t) for n, t in found.items() if n.endswith("lora_A.weight") and t.ndim}
    if ranks and rank not in ranks:
        raise InputError(f"{folder / PRISM_FILE}: rank is {rank}, but {ADAPTER_FILE} has rank "
                         f"{', '.join(map(str, sorted(ranks)))}")
    shaped = zero_weights(config, rank, 0 if layer is None else layer + 1, "meta")
    check_tensors(found, to_peft(shaped, config), path)
    return rank, settings["alpha"], from_peft(found, shaped, config, path)


def describe_base(name: str | None, folder: Path | None) -> dict[str, str | None]:
    """The fields of prism.json that say which base an adapter belongs to."""
    if name is None or folder is None:
        return {"base_model": None, "base_source": None, "base_fingerprint": None}
    base = str(Path(name).resolve()) if Path(name).is_dir() else name
    return {"base_model": base, "base_source": base_source(folder, name),
            "base_fingerprint": fingerprint(folder)}


def check_base(settings: dict, name: str | None, base: Path | None, folder: Path) -> None:
    """Raise InputError if the adapter in `folder` was trained on other weights than the base's."""
    expected = settings["base_fingerprint"]
    if expected and base and expected != fingerprint(base):
        raise InputError(f"{folder}: the adapter was trained on {settings['base_model']} "
                         f"({settings['base_source']}), not on {name}; their weights differ")


def write_settings(folder: Path, settings: dict) -> None:
    """Write prism.json, the last file of a whole adapter."""
    write_file(folder / PRISM_FILE, json.dumps(settings, indent=1) + "\n")


def read_settings(folder: Path) -> dict:
    """prism.json of an adapter folder, its fields checked for presence, type and range; of PEFT's
    own folder what corresponds to it. Without a gate, the gate's fields are None."""
    path = folder / PRISM_FILE
    if not folder.is_dir():
        raise InputError(f"{folder}: no such adapter folder")
    if only_peft(folder):
        config = read_json(folder / PEFT_FILE)
        return {"base_model": config.get("base_model_name_or_path"), "base_fingerprint": None,
                "base_source": None, "rank": config.get("r"), "alpha": config.get("lora_alpha"),
                **dict.fromkeys(GATE_FIELDS)}
    raw = read_json(path)
    gateless = all(name in raw and raw[name] is None for name in GATE_FIELDS)
    types = FIELDS if gateless else FIELDS | GATE_FIELDS
    for name, kind in types.items():
        if name not in raw or not isinstance(raw[name], kind) or isinstance(raw[name], bool):
            raise InputError(f"{path}: field {name!r} is missing or has the wrong type")
        low, high = RANGES.get(name, (None, None))
        if low is not None and not low <= raw[name] <= high:  # also refuses NaN
            raise InputError(f"{path}: {name} is {str(raw[name])[:40]}, it must be in [{low:g}, "
                             f"{high:g}]")
    if not gateless and raw["gate_pool"] not in ("last", "mean"):
        raise InputError(f"{path}: gate_pool is {raw['gate_pool']!r:.40}, neither last nor mean")
    return raw


# --------------------------------------------------------------------------------------------------
# PEFT's folders


def only_peft(folder: Path) -> bool:
    """Whether an adapter folder is PEFT's own: its config is there, and neither of our files."""
    return ((folder / PEFT_FILE).is_file() and not (folder / PRISM_FILE).exists()
            and not (folder / GATE_FILE).exists())


def read_peft(folder: Path, config: Config) -> tuple[int, float, Weights]:
    """Rank, alpha and weights of a LoRA that PEFT trained elsewhere.

    Modules of lower rank than the highest are padded with zeros, missing ones are zeros, and what
    their scales (alpha / rank, or alpha / sqrt(rank)) differ by goes into B.
    """
    modules = peft_modules(folder, config)
    rank = max(len(A) for A, _, _ in modules.values())
    scale = next(iter(modules.values()))[2]
    weights = zero_weights(config, rank, 0)
    for (layer, stack), (A, Bs) in weights.items():
        names = module_names(config, layer)[stack]
        found = [modules.get(name) for name in names]
        if len(names) < len(Bs) and found[0]:  # fused: each part reads the same A
            a, b, s = found[0]
            found = [(a, part, s) for part in b.split([len(B) for B in Bs])]
        for i, module in enumerate(found):
            if module is not None:
                a, b, s = module
                A[i * rank:i * rank + len(a)] = a
                Bs[i][:, :len(a)] = b * (s / scale)
    return rank, scale * rank, weights


def peft_modules(folder: Path, config: Config) -> dict[str, tuple[Tensor, Tensor, float]]:
    """PEFT's module name -> A [r, d], B [o, r] and the scale of their product."""
    settings, path = read_json(folder / PEFT_FILE), folder / ADAPTER_FILE
    check_peft(settings, folder / PEFT_FILE)
    widths, found, modules = module_widths(config), read_tensors(path), {}
    for name in found:
        module, _, half = name.rpartition(".lora_")
        if module not in widths or half not in ("A.weight", "B.weight"):
            raise InputError(f"{path}: {name} is not a LoRA of one of the base's projections")
        A = found.get(f"{module}.lora_A.weight")
        B = found.get(f"{module}.lora_B.weight")
        d, o = widths[module]
        if A is None or B is None or A.shape[1:] != (d,) or B.shape != (o, len(A)):
            shapes = [None if t is None else list(t.shape) for t in (A, B)]
            raise InputError(f"{path}: the A and B of {module} are {shapes[0]} and {shapes[1]}, "
                             f"expected [r, {d}] and [{o}, r]")
        modules[module] = A, B, peft_scale(settings, module, len(A))
    if not modules:
        raise InputError(f"{path}: no LoRA in it")
    return modules


def check_peft(settings: dict, path: Path) -> None:
    """Raise InputError on settings that make an adapter more than a LoRA, by name."""
    for name, neutral in PEFT_NEUTRAL.items():
        if settings.get(name, neutral[0]) not in neutral:
            raise InputError(f"{path}: {name} = {str(settings[name])[:60]} is not supported")
    alphas = [settings.get("lora_alpha"), *(settings.get("alpha_pattern") or {}).values()]
    if not all(isinstance(alpha, (int, float)) for alpha in alphas):
        raise InputError(f"{path}: lora_alpha is not a number")


def peft_scale(settings: dict, module: str, rank: int) -> float:
    """What PEFT multiplies a module's B A x by."""
    alpha = settings["lora_alpha"]
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


# --------------------------------------------------------------------------------------------------
# Tensors


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a small safetensors file."""
    found = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_file(path, to_safetensors(found, {"format": "pt"}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a small safetensors file; InputError if it is not a readable one."""
    check_file(path)
    try:
        return parse_safetensors(path.read_bytes())
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None


def read_gate(path: Path, targets: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a gate from its file, which must be that of one like `targets`."""
    found = read_tensors(path)
    check_tensors(found, targets, path)
    if not bool((found["deviation"] > 0).all()):
        raise InputError(f"{path}: a deviation that is not above zero; no gate like this was "
                         "ever trained")
    return found


def check_tensors(found: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    """InputError unless what was read from `path` has exactly the expected names and shapes, and
    only finite numbers."""
    if found.keys() != expected.keys():
        raise InputError(f"{path}: tensor {min(found.keys() ^ expected.keys())} is missing or "
                         "unexpected")
    for name, target in expected.items():
        if found[name].shape != target.shape:
            raise InputError(f"{path}: {name} is {list(found[name].shape)}, expected "
                             f"{list(target.shape)}")
        if not found[name].is_floating_point() or not bool(found[name].isfinite().all()):
            raise InputError(f"{path}: {name} is not floating point, or holds NaN or infinity")
