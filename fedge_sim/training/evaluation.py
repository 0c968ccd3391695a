"""Many clients evaluated with one model, in large batches: the fast side of ``local.evaluate``."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fedge_sim.data.base import Examples
from fedge_sim.training.device import device_of
from fedge_sim.training.local import Evaluation

# Approximate bytes of examples in a batch on a GPU: smaller ones leave it idle.
GPU_BYTES = 8 * 2**20

# All examples as a client sees them, and the rows to evaluate.
Part = tuple[Examples, NDArray[np.int64]]


@torch.inference_mode()
def evaluate_together(
    model: nn.Module,
    parts: Sequence[Part],
    batch_size: int = 64,
    autocast: torch.dtype | None = None,
) -> list[Evaluation]:
    """Evaluate one model on the examples of several clients, as ``local.evaluate`` on each.

    Parameters
    ----------
    model : nn.Module
    parts : sequence of (Examples, int64 array (n,))
        What each client sees, and which rows of it.
    batch_size : int
        Of the forward pass, at least; a batch may hold several clients' examples.
    autocast : torch.dtype, optional
        Of the forward pass, if not the parameters' own.
    """
    model.eval()
    device, like = device_of(model), next(model.parameters())
    size = batch_size
    if device.type == "cuda" and parts:
        size = max(size, GPU_BYTES // max(1, parts[0][0].x[:1].nbytes))
    losses, right = [], []
    for x, y in _batches(parts, size, device):
        x = x.to(like.dtype)
        if x.dim() == 4:  # convolutions are faster in this layout
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            logits = model(x).to(like.dtype)
        losses.append(functional.cross_entropy(logits, y, reduction="none"))
        right.append(logits.argmax(dim=1) == y)
    if not losses:
        return [Evaluation(0.0, 0.0, 0) for _ in parts]
    # The only place where the device is waited for.
    ends = np.cumsum([len(rows) for _, rows in parts])[:-1]
    both = (np.split(torch.cat(values).cpu().numpy(), ends) for values in (losses, right))
    return [
        Evaluation(float(loss.sum(dtype=np.float64)) / max(len(loss), 1), _mean(hit), len(loss))
        for loss, hit in zip(*both, strict=True)
    ]


def _mean(hits: NDArray[np.bool_]) -> float:
    return int(hits.sum()) / max(len(hits), 1)


def _batches(
    parts: Sequence[Part], size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of a size; the last one may be short, and clients may share one."""
    held: list[tuple[Tensor, Tensor]] = []
    room = size
    for examples, rows in parts:
        while len(rows):
            now, rows = rows[:room], rows[room:]
            held.append(examples.batch(now, device))
            room -= len(now)
            if room == 0:
                yield _joined(held)
                held, room = [], size
    if held:
        yield _joined(held)


def _joined(batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    if len(batches) == 1:
        return batches[0]
    x, y = zip(*batches, strict=True)
    return torch.cat(x), torch.cat(y)
