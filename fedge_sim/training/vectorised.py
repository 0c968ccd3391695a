"""A network as a function over many clients at once: each its own values and its own rows."""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from fedge_sim.models.tracker import Tracker


class Vectorised:
    """A private copy of a network, called with the values of many clients.

    Parameters
    ----------
    network : nn.Module
        Stays as it is; its values do not matter.
    autocast : dtype, optional
        Of the forward pass's matrix products and convolutions; none: the network's own.
    """

    def __init__(self, network: nn.Module, autocast: torch.dtype | None = None) -> None:
        self.module = copy.deepcopy(network).train()
        self._autocast = autocast
        self._rows = _Rows()
        for layer in self.module.modules():
            if isinstance(layer, _BatchNorm) and type(layer).forward is _BatchNorm.forward:
                # In place, so that names, hooks and isinstance are the network's own.
                layer.forward = partial(_batch_norm, layer, layer.forward, self._rows)  # type: ignore[method-assign]
            elif isinstance(layer, Tracker):
                layer.forward = partial(_track, layer, self._rows)  # type: ignore[method-assign]

    def __call__(
        self, state: Mapping[str, Tensor], x: Tensor, valid: Tensor | None, alone: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return every client's logits, and its buffers after the call.

        Parameters
        ----------
        state : mapping
            Parameters and buffers by name, each (N, *shape).
        x : Tensor (N, B, *example_shape)
        valid : bool Tensor (N, B), optional
            Rows that are no padding; none: all.
        alone : bool
            Whether some client has one row only, which BatchNorm refuses.
        """
        self._rows.alone = alone
        buffers = [name for name, _ in self.module.named_buffers() if name in state]
        if valid is None:
            one: Callable[..., Any] = partial(self._one, buffers, None)
            result = vmap(one)(dict(state), x)
        else:
            result = vmap(partial(self._one, buffers))(valid, dict(state), x)
        logits, after = result
        return logits, after

    def _one(
        self, buffers: Iterable[str], valid: Tensor | None, state: dict[str, Tensor], x: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Call the network for one client: x (B, *example_shape), inside of ``vmap``."""
        self._rows.valid = valid
        try:
            with _AnyLayout(), self._precision(x.device):
                logits = functional_call(self.module, state, (x,))
        finally:
            self._rows.valid = None
        # What a forward pass assigns to a buffer, functional_call writes to the mapping.
        return logits, {name: state[name] for name in buffers}

    def _precision(self, device: torch.device) -> Any:
        return torch.autocast(device.type, self._autocast) if self._autocast else nullcontext()


class _Rows:
    """Which rows of the batch under way are no padding: how BatchNorm and trackers know.

    Attributes
    ----------
    valid : bool Tensor (B,), optional
        One client's, inside of ``vmap``; none: all.
    alone : bool
        Whether a client has a single row.
    """

    valid: Tensor | None = None
    alone: bool = False


class _AnyLayout(TorchFunctionMode):
    """Ignores a network's wishes for channels-last tensors, which ``vmap`` cannot fulfil."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if "memory_format" in kwargs:
            kwargs = {key: value for key, value in kwargs.items() if key != "memory_format"}
        return func(*args, **kwargs)


def _batch_norm(
    layer: _BatchNorm, plain: Callable[[Tensor], Tensor], rows: _Rows, x: Tensor
) -> Tensor:
    """Normalise one client's x (B, C, ...) as ``layer`` does, by its valid rows alone."""
    training = layer.training or layer.running_mean is None or layer.running_var is None
    if not training:
        return plain(x)
    layer._check_input_dim(x)
    places = x[0, 0].numel()
    if rows.alone and places == 1:
        raise ValueError(f"Expected more than 1 value per channel when training: {tuple(x.shape)}")
    keeps = layer.training and layer.track_running_stats and layer.running_mean is not None
    factor = _count_batch(layer) if layer.training and layer.track_running_stats else 0.0
    if rows.valid is None:
        return _native(layer, x, factor, keeps)
    wide = x if layer.weight is None else x.to(layer.weight.dtype)  # under autocast
    mask = rows.valid.to(wide.dtype).view(-1, *[1] * (x.dim() - 1))
    # A batch without a valid row is padding too: what comes of it is finite, and dropped.
    count = mask.sum().clamp(min=1) * places
    axes = [0, *range(2, x.dim())]
    mean = (wide * mask).sum(axes, keepdim=True) / count
    centred = wide - mean
    var = (centred.square() * mask).sum(axes, keepdim=True) / count
    if keeps:
        unbiased = var.detach().flatten() * (count / (count - 1).clamp(min=1))
        _keep(layer, mean.detach().flatten(), unbiased, factor)
    scale = torch.rsqrt(var + layer.eps)
    if layer.weight is not None:
        scale = scale * layer.weight.view_as(scale)
    out = centred * scale
    if layer.bias is not None:
        out = out + layer.bias.view_as(scale)
    return out.to(x.dtype)


def _track(layer: Tracker, rows: _Rows, x: Tensor) -> Tensor:
    """Do what ``layer`` does, by one client's valid rows alone."""
    if layer.training:
        layer.track(x, rows.valid)
    return x


def _native(layer: _BatchNorm, x: Tensor, factor: Any, keeps: bool) -> Tensor:
    """Normalise by all rows: PyTorch's own operation, twice as fast as the masked one."""
    # Momentum 1 makes of any running values those of this batch, with the unbiased variance.
    mean = (
        torch.zeros_like(layer.running_mean) if keeps and layer.running_mean is not None else None
    )
    var = torch.zeros_like(layer.running_var) if keeps and layer.running_var is not None else None
    out = functional.batch_norm(x, mean, var, layer.weight, layer.bias, True, 1.0, layer.eps)
    if mean is not None and var is not None:
        _keep(layer, mean, var, factor)
    return out


def _count_batch(layer: _BatchNorm) -> Any:
    """Count a batch, and return the weight of its statistics: a number or a tensor."""
    if layer.num_batches_tracked is None:
        return layer.momentum or 0.0
    layer.num_batches_tracked = layer.num_batches_tracked + 1
    if layer.momentum is not None:
        return layer.momentum
    assert layer.running_mean is not None
    return 1.0 / layer.num_batches_tracked.to(layer.running_mean.dtype)


def _keep(layer: _BatchNorm, mean: Tensor, var: Tensor, factor: Any) -> None:
    """Move the running statistics (C,) towards a batch's."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    layer.running_mean = mean * factor + layer.running_mean * (1 - factor)
    layer.running_var = var * factor + layer.running_var * (1 - factor)
