"""The files of an adapter folder: PEFT's two, prism.json and the gate's; names, tensors, settings.

An adapter is handled here as `Weights`: the A and the B matrices of each stacked projection of each
adapted layer. PEFT has a module for each projection instead, so that reading joins what writing
splits. An adapter that PEFT trained elsewhere is read into the same shape; it has no gate.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from lora import projections
from support.checkpoint import fingerprint, parts
from support.config import Config
from support.fields import Fields, is_number
from support.hub import ADAPTER_FILES, InputError, base_source, check_file, read_json, write_file

ADAPTER_FILE, PEFT_FILE, GATE_FILE, PRISM_FILE = ADAPTER_FILES
# (layer, stacked projection) -> A [p * r, d] and, for each of its p projections, B [o_i, r]
Weights = dict[tuple[int, str], tuple[Tensor, list[Tensor]]]
# Settings of a PEFT adapter that make it more than a LoRA, and the values that do not (of use_*,
# only use_rslora is known). The initialisations that are missing change the base's own weights.
PEFT_NEUTRAL = {"peft_type": ("LORA",), "bias": (None, "none"), "modules_to_save": (None, []),
                "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
                **dict.fromkeys(("lora_bias", "fan_in_fan_out", "layer_replication", "kasa_config",
                                 "trainable_token_indices", "alora_invocation_tokens",
                                 "target_parameters", "arrow_config", "velora_config",
                                 "monteclora_config"), (None, False, [], {}))}
LARGEST_RANK, LARGEST_ALPHA = 10**4, 1e9
FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BASE_FIELDS = ("base_model", "base_source", "base_fingerprint")
GATE_FIELDS = ("gate_layer", "gate_pool", "threshold")  # all null where there is no gate


def module_names(config: Config, layer: int, stack: str) -> list[str]:
    """The names in PEFT's files of the parts of a layer's stacked projection."""
    return [f"base_model.model.model.layers.{layer}.{name}" for name in parts(config)[stack]]


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
        names = module_names(config, layer, stack)
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
        names = module_names(config, layer, stack)
        A = torch.cat([found[f"{name}.lora_A.weight"] for name in names])
        # Split or fused, this is the same matrix, [sum o_i, p * r].
        whole = torch.block_diag(*(found[f"{name}.lora_B.weight"] for name in names))
        blocks = [whole[rows, ranks] for _, rows, ranks in projections(Bs)]
        if not torch.equal(torch.block_diag(*blocks), whole):
            raise InputError(f"{path}: {names[0]}.lora_B is not block-diagonal")
        weights[layer, stack] = A, blocks
    return weights


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a small safetensors file."""
    found = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    write_file(path, to_safetensors(found, {"format": "pt"}))


def read_tensors(path: Path, expected: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """All tensors of a small safetensors file; InputError if it is not readable, holds anything but
    finite floating-point numbers, or has not exactly the `expected` names and shapes."""
    check_file(path)
    try:
        found = parse_safetensors(path.read_bytes())
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None
    for name, tensor in found.items():
        if tensor.dtype not in FLOATING or not bool(tensor.isfinite().all()):
            raise InputError(f"{path}: {name} is not of 16 to 64 bits floating point, or holds NaN "
                             "or infinity")
    if expected is not None and found.keys() != expected.keys():
        raise InputError(f"{path}: tensor {min(found.keys() ^ expected.keys())} is missing or "
                         "unexpected")
    for name, target in (expected or {}).items():
        if found[name].shape != target.shape:
            raise InputError(f"{path}: {name} is {list(found[name].shape)}, expected "
                             f"{list(target.shape)}")
    return found


# --------------------------------------------------------------------------------------------------
# Our own folders


def write_adapter(folder: Path, weights: Weights, config: Config, about: dict) -> None:
    """Write PEFT's two files, and `about` as prism.json, the last of a whole adapter; fp32, each
    file atomically.

    A fused module has the alpha of all its parts, too, so that alpha / rank stays what it is.
    """
    rank, alpha, counts = about["rank"], about["alpha"], {}
    for stack, names in parts(config).items():
        for name in names:  # of "self_attn.q_proj"
            counts[name.split(".")[1]] = len(config.projections[stack][1]) // len(names)
    fused = {name: count for name, count in counts.items() if count > 1}
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM",
        "base_model_name_or_path": about["base_model"],
        "r": rank, "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True, "use_rslora": False, "use_dora": False,
        "layers_to_transform": sorted({layer for layer, _ in weights}), "layers_pattern": "layers",
        "target_modules": list(counts),
        "rank_pattern": {name: count * rank for name, count in fused.items()},
        "alpha_pattern": {name: count * alpha for name, count in fused.items()}}
    write_tensors(folder / ADAPTER_FILE, to_peft(weights, config))
    for name, values in ((PEFT_FILE, settings), (PRISM_FILE, about)):
        write_file(folder / name, json.dumps(values, indent=1) + "\n")


def read_adapter(folder: Path, settings: dict, config: Config) -> tuple[int, float, Weights]:
    """Rank, alpha and weights of an adapter folder, ours or PEFT's own, with its `read_settings`;
    InputError on a broken file, or on something in it that does not fit the base, by name."""
    path = folder / ADAPTER_FILE
    if only_peft(folder):
        return read_peft(path, settings, config)
    rank, layer = settings["rank"], settings["gate_layer"]
    if layer is not None and layer >= config.num_layers - 1:
        raise InputError(f"{folder / PRISM_FILE}: gate_layer is {layer}, but the base has "
                         f"{config.num_layers} layers")
    shaped = zero_weights(config, rank, 0 if layer is None else layer + 1, "meta")
    found = read_tensors(path, to_peft(shaped, config))
    return rank, settings["alpha"], from_peft(found, shaped, config, path)


def describe_base(name: str | None, folder: Path | None) -> dict[str, str | None]:
    """The fields of prism.json that say which base an adapter belongs to."""
    if name is None or folder is None:
        return dict.fromkeys(BASE_FIELDS)
    base = str(Path(name).resolve()) if Path(name).is_dir() else name
    return {"base_model": base, "base_source": base_source(folder, name),
            "base_fingerprint": fingerprint(folder)}


def check_base(settings: dict, name: str | None, base: Path | None, folder: Path) -> None:
    """Raise InputError if the adapter in `folder` was trained on other weights than the base's."""
    expected = settings["base_fingerprint"]
    if expected and base and expected != fingerprint(base):
        raise InputError(f"{folder}: the adapter was trained on {settings['base_model']} "
                         f"({settings['base_source']}), not on {name}; their weights differ")


def read_settings(folder: Path) -> dict:
    """prism.json of an adapter folder, its fields checked for presence, type and range; of PEFT's
    own folder what corresponds to it. Without a gate, the gate's fields are None."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such adapter folder")
    if only_peft(folder):
        return read_peft_settings(folder)
    fields = Fields(read_json(folder / PRISM_FILE), str(folder / PRISM_FILE))
    for name in (*BASE_FIELDS, *GATE_FIELDS):
        if name not in fields.values:
            fields.refuse(name, "is missing")
    for name in BASE_FIELDS:
        fields.text(name, None)
    fields.integer("rank", 1, LARGEST_RANK)
    fields.number("alpha", 1 / LARGEST_ALPHA, LARGEST_ALPHA)
    if any(fields.values[name] is not None for name in GATE_FIELDS):
        fields.integer("gate_layer", 0, 2**10)
        fields.number("threshold", 0, 1)
        if fields.text("gate_pool") not in ("last", "mean"):
            fields.refuse("gate_pool", "is neither last nor mean")
    return fields.values


# --------------------------------------------------------------------------------------------------
# PEFT's folders


def only_peft(folder: Path) -> bool:
    """Whether an adapter folder is PEFT's own: its config is there, and neither of our files."""
    return ((folder / PEFT_FILE).is_file() and not (folder / PRISM_FILE).exists()
            and not (folder / GATE_FILE).exists())


def read_peft_settings(folder: Path) -> dict:
    """What adapter_config.json of PEFT's own folder says, checked for type and range, under the
    names of prism.json where it has one; with PEFT's defaults for what is missing. InputError on a
    value that makes no sense, or makes the adapter more than a LoRA, by name."""
    fields = Fields(read_json(folder / PEFT_FILE), str(folder / PEFT_FILE))
    if "peft_type" not in fields.values:  # as in the files of the same name that MLX writes
        fields.refuse("peft_type", "is missing; it is not an adapter of PEFT's")
    for name, value in fields.values.items():
        neutral = PEFT_NEUTRAL.get(name)
        if name.startswith("use_") and name != "use_rslora":
            neutral = (None, False)
        if neutral is not None and value not in neutral:
            fields.refuse(name, "is not supported")
    alphas = fields.object("alpha_pattern")
    if not all(is_number(alpha, -LARGEST_ALPHA, LARGEST_ALPHA) for alpha in alphas.values()):
        fields.refuse("alpha_pattern", "holds something but numbers")
    try:  # they fit the end of a module's name, from a dot on, or all of it, perhaps anchored (^)
        alphas = {re.compile(rf"(.*\.)?({end})$"): alpha for end, alpha in alphas.items()}
    except (re.error, RecursionError, OverflowError) as error:
        fields.refuse("alpha_pattern", f"holds a broken regular expression ({error})")
    return dict.fromkeys((*BASE_FIELDS, *GATE_FIELDS)) | {
        "base_model": fields.text("base_model_name_or_path", None),
        "rank": fields.integer("r", 1, LARGEST_RANK, default=8),
        "alpha": fields.number("lora_alpha", -LARGEST_ALPHA, LARGEST_ALPHA, default=8),
        "use_rslora": fields.flag("use_rslora"), "alphas": alphas}


def read_peft(path: Path, settings: dict, config: Config) -> tuple[int, float, Weights]:
    """Rank, alpha and weights of a LoRA that PEFT trained elsewhere.

    Modules of lower rank than the highest are padded with zeros, missing ones are zeros, and scales
    (alpha / rank, or alpha / sqrt(rank)) that differ, or are not above zero, go into B.
    """
    trained = peft_modules(path, settings, config)
    rank = max(len(A) for A, _, _ in trained.values())
    scales = {scale for _, _, scale in trained.values()}
    common = max(scales)
    if len(scales) > 1 or common <= 0:
        common = 1.0
    weights = zero_weights(config, rank, 0)
    for (layer, stack), (A, Bs) in weights.items():
        names = module_names(config, layer, stack)
        found = [trained.get(name) for name in names]
        if len(names) < len(Bs) and found[0]:  # fused: each part reads the same A
            a, b, scale = found[0]
            found = [(a, part, scale) for part in b.split([len(B) for B in Bs])]
        for own_A, own_B, module in zip(A.split(rank), Bs, found):
            if module:
                a, b, scale = module
                own_A[:len(a)] = a
                own_B[:, :len(a)] = b * (scale / common)
    return rank, rank * common, weights


def peft_modules(path: Path, settings: dict,
                 config: Config) -> dict[str, tuple[Tensor, Tensor, float]]:
    """PEFT's module name -> A [r, d], B [o, r] and the scale of their product. Which modules have a
    LoRA, and of which rank, is what the tensors say."""
    possible = to_peft(zero_weights(config, 1, 0, "meta"), config)
    tensors, found = read_tensors(path), {}
    for name in tensors:
        if name not in possible:
            raise InputError(f"{path}: {name} is not a LoRA of one of the base's projections")
        module = name.rpartition(".lora_")[0]
        at_A, at_B = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        A, B = tensors.get(at_A), tensors.get(at_B)
        d, o = possible[at_A].shape[1], len(possible[at_B])
        if A is None or B is None or not len(A) or A.shape[1:] != (d,) or B.shape != (o, len(A)):
            shapes = [None if t is None else list(t.shape) for t in (A, B)]
            raise InputError(f"{path}: the A and B of {module} are {shapes[0]} and {shapes[1]}, "
                             f"expected [r, {d}] and [{o}, r]")
        key, r = module.removeprefix("base_model.model."), len(A)
        fitting = (alpha for end, alpha in settings["alphas"].items() if end.match(key))
        alpha = next(fitting, settings["alpha"])
        found[module] = A, B, alpha / (r**0.5 if settings["use_rslora"] else r)
    if not found:
        raise InputError(f"{path}: no LoRA in it")
    return found
