"""A random llama small enough to run the whole method in seconds, with SmolLM2's own chat format.

Its tokenizer is SmolLM2's cut to the first merges. Its weights are random, with one planted habit:
every position puts a few per cent on the end of the turn, so that answers end like a real model's.
"""

import contextlib
import json
from pathlib import Path
from typing import Callable, Iterator

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lora import LoRA
from model import Transformer
from prism import PRISM
from support import hub
from sampling import Sampling, sample
from support.device import pad

VOCAB = 2048
END_OF_TURN = 2  # "<|im_end|>" in SmolLM2's vocabulary
END_LOGIT = 6.0  # about what the end of a turn leads the other logits by


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread: faster for matrices this small, and the same in every process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def tiny_tokenizer(folder: Path) -> None:
    """Write SmolLM2's tokenizer files to `folder`, the vocabulary cut to its first ids."""
    source = hub.resolve(hub.DEFAULT_MODEL)
    settings = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    model = settings["model"]
    model["vocab"] = {token: i for token, i in model["vocab"].items() if i < VOCAB}
    merges = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    model["merges"] = [m for m in merges if "".join(m) in model["vocab"]]
    (folder / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    for name in ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (source / name).is_file():
            (folder / name).write_bytes((source / name).read_bytes())


def tiny_llama(folder: Path, seed: int = 0, layers: int = 3) -> Path:
    """Save a random llama (hidden 32, 4 heads, 2 key/value heads, fp32) and its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        initializer_range=0.2, tie_word_embeddings=False, bos_token_id=1,
        eos_token_id=END_OF_TURN, pad_token_id=END_OF_TURN)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = LlamaForCausalLM(config).float()
    with torch.no_grad():
        net.model.embed_tokens.weight.mul_(3)  # what was read shows in what comes next
        net.lm_head.weight.mul_(3)
        # Column 0 of the residual stream is nearly constant, and only the end of turn reads it.
        net.model.embed_tokens.weight[:, 0] = 2.0
        net.lm_head.weight[:, 0] = 0.0
        net.lm_head.weight[END_OF_TURN, 0] = END_LOGIT
    net.save_pretrained(folder)
    tiny_tokenizer(folder)
    return folder


def randomize_adapter(prism: PRISM, seed: int = 1, scale: float = 0.1) -> PRISM:
    """Give every B random values, as if the adapter had been trained; returns its argument."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in prism.adapter.modules():
            for b in module.B if isinstance(module, LoRA) else ():
                b.copy_(torch.randn(b.shape, generator=generator) * scale)
    return prism


def random_prompts(vocab: int, rows: int, longest: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Right-padded random ids [rows, longest] and their lengths [rows], all different."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (rows, longest), generator=generator)
    lengths = torch.randperm(longest, generator=generator)[:rows] + 1
    lengths[int(lengths.argmax())] = longest
    ids[torch.arange(longest)[None] >= lengths[:, None]] = 0
    return ids, lengths


def make_prism(net: Transformer, gate_pool: str = "last", gate_layer: int = 0) -> PRISM:
    """A PRISM whose adapter and gate are random, and strong enough to matter."""
    return randomize_adapter(PRISM(net, 4, 8, gate_layer, gate_pool, seed=5).eval(), 5, 0.3)


def halve(prism: PRISM, prompts: list[list[int]]) -> Tensor:
    """Set the threshold so that about half of the prompts are gated; returns their flags [B]."""
    probability = prism.gate_probability(*pad(prompts, "cpu"))
    ordered, middle = probability.sort().values, len(prompts) // 2
    prism.threshold = ordered[middle - 1:middle + 1].mean().item()
    return probability >= prism.threshold


def plain_log_p(logits: Callable[[Tensor], Tensor], prompt: list[int],
                target: list[int]) -> Tensor:
    """log P of each target token behind a prompt, from the logits of one plain forward pass."""
    scores = logits(torch.tensor([[*prompt, *target]]))[0, len(prompt) - 1:-1]
    return scores.log_softmax(-1).gather(1, torch.tensor(target)[:, None])[:, 0]


@torch.no_grad()
def plain_loop(logits: Callable[[Tensor], Tensor], prompt: list[int], sampling: Sampling,
               stop: set[int], seed: int = 0) -> list[int]:
    """The answer to one prompt without engine, batch or cache: the whole text is read again for
    every token."""
    draws = torch.rand(sampling.max_new_tokens, generator=torch.Generator().manual_seed(seed))
    answer: list[int] = []
    while len(answer) < sampling.max_new_tokens and not (answer and answer[-1] in stop):
        last = logits(torch.tensor([prompt + answer]))[:, -1]
        answer += sample(last, sampling, draws[len(answer):len(answer) + 1]).tolist()
    return answer
