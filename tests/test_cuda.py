"""What only a GPU can show. Nobody has run these tests: no machine of this project has one."""

import warnings
from pathlib import Path

import pytest
import torch

from engine import Engine, Request
from model import load
from prism import PRISM, distill_loss
from sampling import Sampling
from tiny import randomize_adapter

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device here; nobody has run this test yet")]


def test_answers_equal_the_cpu(folder: Path) -> None:
    """fp32 logits or greedy ids of a GPU would not be the CPU's, or a replayed step draw other ids
    than the same step launched kernel by kernel."""
    ids, logits, found = torch.arange(60).view(4, 15) + 5, [], []
    requests = [Request([5, 6, 7, 8, 9][:1 + i % 5], i) for i in range(11)]
    for device, static in (("cpu", False), ("cuda", False), ("cuda", True)):
        prism = randomize_adapter(PRISM(load(folder, device, torch.float32), rank=4))
        logits.append(prism.net(ids.to(device)).cpu())
        for gate in ("auto", "on", "off"):
            engine = Engine(prism, Sampling(40, 0.0), {2}, 4, gate)
            engine.static = static
            found.append({out.index: out.ids for out in engine.run(requests)})
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-3)
    assert found[:3] == found[3:6] == found[6:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ungated_rows_are_the_base(folder: Path, dtype: torch.dtype) -> None:
    """Rows from k on would not be the base's bit for bit at the same batch shape."""
    prism = randomize_adapter(PRISM(load(folder, "cuda", dtype), rank=4))
    ids = torch.arange(120, device="cuda").view(8, 15) + 5
    with torch.no_grad():
        mixed, base = prism(ids, 3), prism.net(ids)
    assert torch.equal(mixed[3:], base[3:]) and not torch.equal(mixed[:3], base[:3])


def test_a_step_waits_once(folder: Path) -> None:
    """Between two refills the host would wait for the device more than once a token."""
    prism = randomize_adapter(PRISM(load(folder, "cuda", torch.float32), rank=4))
    engine = Engine(prism, Sampling(40, 0.7), set(), 4)
    run = engine.run([Request([5, 6, 7], i) for i in range(4)])
    waits: list[int] = []
    step = engine._step

    def counted() -> None:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing CUDA operation" in str(w.message) for w in found))

    engine._step = counted
    assert len(list(run)) == 4
    assert len(waits) == 39 and max(waits) == 1


def test_distillation_gradient_equals_the_cpu(folder: Path) -> None:
    """The chunked KL would give another loss or gradient on a GPU."""
    found = []
    for device in ("cpu", "cuda"):
        net = load(folder, device, torch.float32)
        generator = torch.Generator().manual_seed(0)
        student, teacher = torch.randn(2, 50, 32, generator=generator).to(device)
        student.requires_grad_()
        loss = distill_loss(student, teacher, net)
        loss.backward()
        found.append((loss.detach().cpu(), student.grad.cpu()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
