"""The settings of a run: the command line of train.py, its constants, and what depends on which."""

import argparse
import hashlib
import json
from pathlib import Path

from bootstrap import ANSWER_TEMPERATURE, HOLD_OUT_EVERY
from gate import GATE_RULES
from judge import JUDGES, VERDICT_RULES
from model import Sizes, Transformer
from queries import QUERY_RULES, STYLES
from support.checkpoint import fingerprint, text_fingerprint
from support.config import Config
from support.hub import DEFAULT_MODEL, InputError, Parser, base_source, read_json, resolve
from support.personas import load_personas, persona_hash
from support.rule import NOBODY, asks_no_model, is_rule, judge_in_place
from support.runs import SETTINGS, STAGES

PAPER = {"queries": 50, "max_new_tokens": 512, "epochs": 10}
QUICK = {"queries": 10, "max_new_tokens": 64, "epochs": 4}
JUDGE_NAMES = ("auto", *JUDGES, NOBODY)
QUICK_PERSONAS = ("coding", "math", "safety_monitor", "writing")
GATE_DEPTH = 6  # the gate reads the output of layer (number of layers) // 6, unless told otherwise
WARMUP = 0.05  # share of the steps in which the learning rate rises
WEIGHT_DECAY, CLIP = 0.01, 1.0
LORA_RULES = (HOLD_OUT_EVERY, WARMUP, WEIGHT_DECAY, CLIP)


def parser() -> argparse.ArgumentParser:
    """The command line of train.py. Defaults that --quick changes are filled in by `check`."""
    p = Parser(
        description="Run PRISM on a base model: write queries, answer them with and without each "
        "persona, self-verify, train the gate, distil the adapter. Exit status 0 done, 2 wrong "
        "input, 3 nothing to distil, 130 interrupted; the same command continues.")

    def add(group: object, name: str, default: object, text: str, **kwargs: object) -> None:
        """A flag with its default in its help."""
        kwargs.setdefault("type", type(default))
        group.add_argument(name, default=default, help=f"{text} (default: {default})", **kwargs)

    def quick(group: object, name: str, text: str) -> None:
        """A whole number that --quick lowers."""
        key = name.strip("-").replace("-", "_")
        group.add_argument(name, type=int, help=f"{text} (default: {PAPER[key]}; --quick: "
                           f"{QUICK[key]})")

    run = p.add_argument_group("run")
    add(run, "--model", DEFAULT_MODEL, "model id or checkpoint folder")
    run.add_argument("--personas", type=Path, help="folder of *.txt contexts (default: personas/ "
                     f"beside train.py; --quick: {', '.join(QUICK_PERSONAS)} of these)")
    run.add_argument("--out", type=Path, help="output folder (default: out/<model-slug>)")
    run.add_argument("--quick", action="store_true",
                     help="the whole method in minutes: fewer, shorter samples; other flags win")
    add(run, "--seed", 0, "seed of every random draw")
    add(run, "--device", "auto", "auto, cpu, cuda, ...")
    add(run, "--dtype", "auto", "auto, bfloat16, float32, float16")
    run.add_argument("--stop-after", choices=STAGES, help="end after this stage")
    run.add_argument("--from", dest="redo", choices=STAGES,
                     help="do this stage and those after it again")
    run.add_argument("--dry-run", action="store_true",
                     help="print the memory plan of --model (or of a config.json) and end")
    run.add_argument("--gpu-memory", type=float, metavar="GB", help="plan for a GPU of this size, "
                     "instead of the one there")
    run.add_argument("--slots", type=whole_or_auto, metavar="auto|N",
                     help=f"answers decoded together (default: auto, {Sizes.slots} on a CPU; on a "
                     "GPU the most that the memory plan allows, up to 256)")
    run.add_argument("--overwrite", action="store_true",
                     help="drop the results that other settings or edited files make invalid (all "
                     "of a complete run, if none do)")
    data = p.add_argument_group("stages 1-3: the data")
    quick(data, "--queries", "queries a persona")
    quick(data, "--max-new-tokens", "longest answer, in tokens")
    add(data, "--query-style", "auto", "how queries are written: the model is asked for one (the "
        "paper), or goes on as the user; auto tries both", choices=tuple(STYLES))
    add(data, "--judge", "auto", "auto tests the model's judges and takes one; or force one; none "
        "distils every context's answer; FILE.py is a rule of yours (docs/forking.md)",
        type=judge_name, metavar="|".join((*JUDGE_NAMES, "FILE.py")))
    data.add_argument("--judge-model", metavar="ID|DIR", help="judge with another model, which is "
                      "then no self-verification (default: the model itself)")
    gate = p.add_argument_group("stage 4: the gate")
    gate.add_argument("--gate-layer", type=int, help="decoder layer whose output the gate reads; "
                      "no layer up to it has an adapter (paper: 0; default: a sixth of the layers)")
    add(gate, "--gate-pool", "mean", "last prompt token (the paper), or mean over the user's text",
        choices=("last", "mean"))
    add(gate, "--gate-target", "auto", "what the gate learns: the verdicts (the paper), the win "
        "rate of each query's persona (intent); auto: intent, unless verdicts do clearly better",
        choices=("auto", "verdict", "intent"))
    add(gate, "--gate-rate", 0.05, "the most of ordinary traffic that may open the gate")
    gate.add_argument("--gate-threshold", type=threshold, metavar="auto|P", help="probability from "
                      "which the adapter answers (paper: 0.5; default: auto, from the ROC curve)")
    lora = p.add_argument_group("stage 5: the adapter")
    add(lora, "--rank", 16, "LoRA rank")
    add(lora, "--alpha", 32.0, "LoRA alpha; the update is scaled by alpha / rank")
    quick(lora, "--epochs", "passes over the distill set")
    add(lora, "--lr", 2e-4, "peak learning rate")
    add(lora, "--batch-size", 4, "samples in an optimizer step (the paper: 16)")
    add(lora, "--max-len", 1024, "longest training sequence, in tokens, persona included")
    add(lora, "--loss", "kl", "kl: distil the teacher's distributions (PRISM); sft: cross-entropy "
        "on the won answers, the baseline that evaluate.py --sft-adapter compares with",
        choices=("kl", "sft"))
    add(lora, "--kd-temperature", 1.0, "distillation temperature")
    add(lora, "--dropout", 0.05, "dropout on the LoRA branch")
    return p


def threshold(text: str) -> float | None:
    """--gate-threshold: "auto" is None."""
    return None if text == "auto" else float(text)


def whole_or_auto(text: str) -> int | None:
    """--slots: "auto" is None."""
    return None if text == "auto" else int(text)


def judge_name(text: str) -> str:
    """--judge: one of JUDGE_NAMES, or a file of Python."""
    if text not in JUDGE_NAMES and not asks_no_model(text):
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(JUDGE_NAMES)}, or a "
                                         "rule (FILE.py)")
    return text


def check(args: argparse.Namespace) -> None:
    """Fill in what --quick decides and refuse values out of range."""
    for name, value in (QUICK if args.quick else PAPER).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name, low, high in (("queries", 1, 1e6), ("max_new_tokens", 1, 1e6), ("epochs", 1, 1e5),
                            ("batch_size", 1, 1e5), ("rank", 1, 1e4), ("max_len", 8, 1e7),
                            ("alpha", 1e-9, 1e9), ("lr", 1e-12, 1e3), ("dropout", 0, 0.99),
                            ("kd_temperature", 1e-3, 1e3), ("gate_threshold", 0, 1),
                            ("gate_rate", 1e-6, 1), ("gpu_memory", 1, 1e5), ("slots", 1, 4096),
                            ("seed", -2**63, 2**63 - 1)):  # torch's seeds
        value = getattr(args, name)
        if value is not None and not low <= value <= high:  # also refuses NaN
            raise InputError(f"--{name.replace('_', '-')} is {value}, it must be in [{low:g}, "
                             f"{high:g}]")
    if judge_in_place(args.judge) and args.judge_model:
        raise InputError(f"--judge-model {args.judge_model}: no model judges with --judge "
                         f"{args.judge}; leave one of them out")
    if args.out is None:
        args.out = Path("out") / args.model.rstrip("/").split("/")[-1].lower()


def choose_personas(args: argparse.Namespace) -> dict[str, str]:
    """Those of --personas; without it the bundled ones, four of them with --quick."""
    if args.personas is not None:
        return load_personas(args.personas)
    bundled = load_personas(Path(__file__).parent.parent / "personas")
    return {name: bundled[name] for name in (QUICK_PERSONAS if args.quick else bundled)}


def check_judge(args: argparse.Namespace, folder: Path) -> None:
    """Refuse a judge that could not read two answers at once: after the stages before it, it would
    cost hours."""
    if asks_no_model(args.judge):
        return
    judging = resolve(args.judge_model) if args.judge_model else folder
    config = Config.from_json(read_json(judging / "config.json"), str(judging))
    if 2 * args.max_new_tokens >= config.max_position_embeddings:
        raise InputError(f"{judging}: --max-new-tokens is {args.max_new_tokens}, but a judge reads "
                         f"two answers at once, in a context of {config.max_position_embeddings} "
                         "tokens; use fewer, or a --judge-model with a longer context")


def run_settings(args: argparse.Namespace, net: Transformer, folder: Path,
                 personas: dict[str, str]) -> dict:
    """Everything that decides the run's files, for run.json."""
    names = [name for stage in SETTINGS.values() for name in stage]
    settings = {name: getattr(args, name) for name in names if hasattr(args, name)}
    judge = fingerprint(resolve(args.judge_model)) if args.judge_model else None
    rule = None
    if is_rule(args.judge):
        rule = hashlib.sha256(Path(args.judge).read_bytes()).hexdigest()
    settings |= {"seed": args.seed, "personas": list(personas),
                 "personas_sha256": persona_hash(personas),
                 "base_source": base_source(folder, args.model),
                 "base_fingerprint": fingerprint(folder),
                 "text_fingerprint": text_fingerprint(folder), "device": net.device.type,
                 "dtype": str(net.dtype).removeprefix("torch."), "slots": net.sizes.slots,
                 "score_tokens": net.sizes.score_tokens, "score_logits": net.sizes.score_logits,
                 "train_tokens": net.sizes.train_tokens,
                 "judge_fingerprint": judge, "rule_sha256": rule,
                 "answer_temperature": ANSWER_TEMPERATURE}
    # Prompts and constants of the code that decide rows: a run notices when they are changed.
    for name, rules in (("query_rules", QUERY_RULES), ("verdict_rules", VERDICT_RULES),
                        ("gate_rules", GATE_RULES), ("lora_rules", LORA_RULES)):
        settings[name] = hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:16]
    return settings
