"""How a step is written for the compiler, so that fast code for a CPU comes out.

Left alone, the compiler takes the root of a channel's variance for every element, sums a channel
over the whole batch in one walk through memory, and stores ReLU's result for the backward pass
although its input is stored too. Here what belongs to a channel is computed once, sums are taken
within each example first, which is also more exact, and ReLU's gradient asks for its input.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

aten = torch.ops.aten

EXACT = (torch.float32, torch.float64)  # types that sums may be taken in

# A value that is read from at most 8 tensors (PyTorch: four) is computed again where it is
# used, which is faster than fetching it from beyond the cache.
OPTIONS = {"realize_reads_threshold": 8}


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """Normalise channels over batch and places (Ioffe & Szegedy 2015, algorithm 1).

    Parameters
    ----------
    x : Tensor (B, C, ...)
    weight, bias, running_mean, running_var : Tensor (C,), optional
        The running ones are changed in place; the variance is the unbiased one.
    training : bool
        If not, or if x has 16 bits, this is left to PyTorch.
    momentum, eps : float

    Returns
    -------
    out : Tensor (B, C, ...)
    mean, inverse : Tensor (C,)
        Of the batch: the mean, and one over the deviation.
    """
    if not training or x.dtype not in EXACT:
        return NotImplemented
    count = x.numel() // x.shape[1]
    mean = _once(_over_channels(x) / count)
    centred = x - _along(mean, x)
    variance = _once(_over_channels(centred.square()) / count)
    inverse = _once(torch.rsqrt(variance + eps))
    scale = _scale(inverse, weight)
    out = centred * _along(scale, x)
    if bias is not None:
        out = out + _along(bias, x)
    unbiased = variance * (count / (count - 1))
    for running, new in ((running_mean, mean), (running_var, unbiased)):
        if running is not None:
            running.copy_((1 - momentum) * running + momentum * new)
    return out, mean, inverse


def batch_norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    _running_mean: Tensor | None,
    _running_var: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    training: bool,
    _eps: float,
    _wanted: Sequence[bool],
) -> Any:
    """Return the gradients of x, weight and bias, given that of what :func:`batch_norm` returned.

    The other parameters are as there; the compiler leaves out what nobody uses.
    """
    if not training or x.dtype not in EXACT:
        return NotImplemented
    count = x.numel() // x.shape[1]
    centred = x - _along(mean, x)
    of_bias = _over_channels(gradient)
    of_weight = _once(_over_channels(gradient * centred) * inverse)
    scale = _scale(inverse, weight)
    # (g - mean of g - normalised x * mean of g * normalised x) * scale
    shared, slope = _once(of_bias / count), _once(scale * inverse * of_weight / count)
    of_x = (gradient - _along(shared, x)) * _along(scale, x) - centred * _along(slope, x)
    return of_x, of_weight, of_bias


def convolution_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> Any:
    """Return the gradients of a convolution's x, weight and bias; the last one as a plain sum."""
    if not wanted[2]:
        return NotImplemented
    how = (stride, padding, dilation, transposed, output_padding, groups)
    without = [wanted[0], wanted[1], False]
    of_x, of_weight, _ = aten.convolution_backward(gradient, x, weight, bias_sizes, *how, without)
    return of_x, of_weight, _over_channels(gradient)


def _over_channels(x: Tensor) -> Tensor:
    """Sum (B, C, ...) to (C,), over the places of each example first."""
    places = tuple(range(2, x.dim()))
    return (x.sum(places) if places else x).sum(0)


def _along(channels: Tensor, x: Tensor) -> Tensor:
    """View (C,) so that it goes with x (B, C, ...)."""
    return channels.view(-1, *[1] * (x.dim() - 2))


def _scale(inverse: Tensor, weight: Tensor | None) -> Tensor:
    return inverse if weight is None else _once(inverse * weight)


def _once(channels: Tensor) -> Tensor:
    """Return (C,) as a view that the compiler has to store: it would compute it at every use."""
    return torch.as_strided(channels, channels.shape, channels.stride())


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.native_batch_norm.default: batch_norm,
    aten.native_batch_norm_backward.default: batch_norm_backward,
    aten.convolution_backward.default: convolution_backward,
}


def mask_by_input(module: GraphModule) -> None:
    """Let ReLU's gradient look at what went into ReLU: it is positive where the result is.

    Parameters
    ----------
    module : GraphModule
        Of operators without side effects; it is changed.
    """
    for node in module.graph.find_nodes(op="call_function", target=aten.threshold_backward.default):
        result = node.args[1]
        while result.target is aten.detach.default:
            result = result.args[0]
        if result.target is aten.relu.default and node.args[2] == 0:
            node.update_arg(1, result.args[0])
    module.recompile()
