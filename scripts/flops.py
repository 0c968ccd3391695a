"""Useful floating-point operations of training, and the rate at which this machine could do them.

The count: a convolution or linear layer takes, for each value of its output, as many
multiply-adds as the filter behind that value has weights (convolution: C_in x K for each of
C_out x T_out values; linear: in for each of out), and a multiply-add is 2 FLOPs. The backward
pass takes twice the forward one: the gradient with respect to the weights, and that with respect
to the input, which the first layer does not need. So, with F multiply-adds forward and F_1 of
these in the first layer, training takes 2 (3 F - F_1) FLOPs an example. Normalisation, ReLU,
pooling, loss and optimiser are not counted: a few per cent. Nor is evaluation.
"""

import multiprocessing
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from typing import Any

import torch
from torch import Tensor, nn

from fedge_sim.runtime.in_process import available_cores

FLOPS_A_MULTIPLY_ADD = 2
SIZE, SIZE_ON_GPU = 1024, 8192
SECONDS, WARM_UP = 2.0, 5


@dataclass(frozen=True)
class Work:
    """Multiply-adds of one example's forward pass: of all layers, and of the first."""

    forward: int
    first: int

    @property
    def training_flops(self) -> int:
        """FLOPs of training on one example, forward and backward."""
        return FLOPS_A_MULTIPLY_ADD * (3 * self.forward - self.first)

    def __str__(self) -> str:
        return (
            f"2 x (3 x {self.forward / 1e6:.3f} M - {self.first / 1e6:.3f} M multiply-adds) = "
            f"{self.training_flops / 1e6:.2f} MFLOP"
        )


def count(network: nn.Module, example_shape: Sequence[int]) -> Work:
    """Count what a network does, by running it on one example.

    Raises
    ------
    ValueError
        If it has neither convolutions nor linear layers.
    """
    multiply_adds: list[int] = []

    def note(layer: nn.Module, _: object, output: Tensor) -> None:
        multiply_adds.append(output[0].numel() * layer.weight[0].numel())

    layers = [m for m in network.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)]
    if not layers:
        raise ValueError(f"{type(network).__name__}: no convolution or linear layer to count")
    hooks = [layer.register_forward_hook(note) for layer in layers]
    was_training = network.training
    try:
        with torch.inference_mode():
            network.eval()(torch.zeros(1, *example_shape))
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    return Work(sum(multiply_adds), multiply_adds[0])


@dataclass(frozen=True)
class Sgemm:
    """How fast this machine multiplies float32 matrices.

    Attributes
    ----------
    each : float
        FLOP/s of a core, or of the GPU.
    count : int
        Cores that were measured at the same time; 1 for the GPU.
    unit : {"core", "GPU"}
    how : str
        What was measured.
    """

    each: float
    count: int
    unit: str
    how: str

    @property
    def total(self) -> float:
        """FLOP/s of all together."""
        return self.each * self.count

    def __str__(self) -> str:
        return f"{self.each / 1e9:,.0f} GFLOP/s a {self.unit}: {self.how}"


def sgemm() -> Sgemm:
    """Measure this machine: the GPU if there is one, else all cores at the same time."""
    if torch.cuda.is_available():
        rate = multiply(torch.device("cuda"), SIZE_ON_GPU)
        how = f"float32 {SIZE_ON_GPU} x {SIZE_ON_GPU} matrices without TF32"
        return Sgemm(rate, 1, "GPU", how)
    processes = available_cores()
    context = multiprocessing.get_context("spawn")
    together, answers = context.Barrier(processes), context.Queue()
    own = [
        context.Process(target=_multiply_on_core, args=(together, answers))
        for _ in range(processes)
    ]
    for process in own:
        process.start()
    rates = [answers.get(timeout=120) for _ in own]
    for process in own:
        process.join()
    how = f"float32 {SIZE} x {SIZE} matrices, 1 thread in each of {processes} processes at once"
    return Sgemm(statistics.mean(rates), processes, "core", how)


def _multiply_on_core(together: Barrier, answers: Any) -> None:
    torch.set_num_threads(1)
    together.wait()
    answers.put(multiply(torch.device("cpu"), SIZE))


def multiply(device: torch.device, size: int) -> float:
    """Multiply square matrices for a while; return the median FLOP/s."""
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    out, times = torch.empty_like(a), []
    begun = time.perf_counter()
    while time.perf_counter() - begun < SECONDS or len(times) <= WARM_UP:
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return FLOPS_A_MULTIPLY_ADD * size**3 / statistics.median(times[WARM_UP:])
