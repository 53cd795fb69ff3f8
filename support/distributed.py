"""More than one device: `torchrun --nproc-per-node N train.py ...`, one process for each.

Every process holds the whole frozen base and makes the same decisions from the same files; only the
first one (rank 0) writes. Stages 1-3 deal out whole chunks, whose rows depend on nothing but the
chunk, so N processes write the very rows that one would; stage 5 deals out the samples of a batch
and sums their gradients. Started without torchrun, each function here does the obvious for one
process.

All processes see one file system. What they tell each other is JSON and bare tensors, because
torch.distributed's way of sending objects would unpickle them.
"""

import json
import os
import time
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from support.hub import InputError

PATIENCE = timedelta(hours=6)  # how long processes wait for the slowest
HEAD_START = 5  # seconds: torchrun ends all as soon as one has left with a status; the first speaks


def rank() -> int:
    """This process's number; the first is 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def progress_bar(name: str | None, unit: str, items: Sequence | None = None,
                 total: int | None = None) -> tqdm:
    """A bar within a stage, shown once its work has taken two seconds, by the first process alone;
    none without a name. It goes through `items`, or counts to `total` by its `update`."""
    return tqdm(items, desc=name, total=total, unit=unit, dynamic_ncols=True, delay=2, leave=False,
                disable=name is None or rank() > 0)


@contextmanager
def processes(device: torch.device) -> Iterator[torch.device]:
    """Join the processes that torchrun started, if it did; yields the device of this one.

    What is wrong with the input is wrong for all of them: the first alone tells it.
    """
    if not dist.is_torchelastic_launched():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise InputError(f"{os.environ['LOCAL_WORLD_SIZE']} processes, but only "
                             f"{torch.cuda.device_count()} GPUs here; lower --nproc-per-node")
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                            timeout=PATIENCE)
    try:
        yield device
    except InputError as error:
        if not isinstance(error, ToldError):
            with suppress(InputError):
                _gather([None, str(error)])  # the others hear it where they next exchange something
        if rank() == 0:
            raise
        time.sleep(HEAD_START)
        raise SystemExit(2) from None
    finally:
        dist.destroy_process_group()


class ToldError(InputError):
    """What was wrong in another process, or here and the others know it."""


def exchange(value: object) -> list:
    """What each process says (JSON), in the order of their ranks.

    Raises:
        ToldError: one of them had an InputError instead.
    """
    if world_size() == 1:
        return [value]
    answers = _gather([value, None])
    for _, error in answers:
        if error is not None:
            raise ToldError(error)
    return [said for said, _ in answers]


def _gather(value: object) -> list:
    """Everybody's JSON value."""
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(world_size())]
    _wait(dist.all_gather, sizes, torch.tensor([len(text)]))
    longest = max(int(n) for n in sizes)
    texts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
    _wait(dist.all_gather, texts, torch.nn.functional.pad(text, (0, longest - len(text))))
    return [json.loads(bytes(t[:int(n)].tolist())) for t, n in zip(texts, sizes)]


def _wait(operation: Callable, *args: object) -> None:
    """Run a collective operation; InputError if another process is gone."""
    try:
        operation(*args)
    except RuntimeError as error:
        raise ToldError("another process of this run has ended; what was finished is kept, the "
                        f"same command continues ({str(error).splitlines()[0]})") from None


@contextmanager
def main_first() -> Iterator[None]:
    """The first process runs the block, then the others do, who find on disk what it left there.
    Where it fails they do not begin."""
    if rank() == 0:
        yield
        exchange(None)
    else:
        exchange(None)
        yield


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace every gradient by its sum over the processes, in one message."""
    if world_size() == 1:
        return
    parameters = list(parameters)
    for p in parameters:
        if p.grad is None:  # a batch with fewer samples than processes
            p.grad = torch.zeros_like(p)
    gradients = [p.grad for p in parameters]
    flat = parameters_to_vector(gradients)
    _wait(dist.all_reduce, flat)
    vector_to_parameters(flat, gradients)
