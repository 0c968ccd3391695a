"""Calling the same operations again and again: on a GPU as a CUDA graph, which costs one launch."""

import logging
import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_recording = threading.Lock()  # CUDA waits for the whole device where a capture begins

WARM_UP = 3  # calls on a side stream before a capture, as PyTorch's notes ask for
WORTH_IT = 20  # calls after which a capture has repaid its cost
MOST = 16  # recordings kept, each with its own static inputs


class Recorder(Protocol):
    """What records operations on a device."""

    def warm_up(self, call: Callable[[], None]) -> None:
        """Call, where lazily made handles and workspaces do not disturb a capture."""

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """Record what ``call`` would do, without doing it; return what does it."""


class CudaRecorder:
    """Records CUDA graphs; all share one pool of memory, as they never run at the same time.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, call: Callable[[], None]) -> None:
        """Call on the side stream, in order with what is around it."""
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        with torch.cuda.stream(self._side):
            call()
        torch.cuda.current_stream(self._side.device).wait_stream(self._side)

    def capture(self, call: Callable[[], None]) -> Callable[[], None]:
        """Record a graph; other threads may use the device meanwhile, but not record."""
        graph = torch.cuda.CUDAGraph()
        with (
            _recording,
            torch.cuda.graph(
                graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"
            ),
        ):
            call()
        return graph.replay


@dataclass
class _Recording:
    """One shape of call: how often it was warmed up, its static inputs, and its replay."""

    warm: int = 0
    inputs: tuple[Tensor, ...] = ()
    replay: Callable[[], None] | None = None


class Replayer:
    """Calls a step that changes tensors in place, recorded where that pays.

    Parameters
    ----------
    step : callable
        From tensors and a mode to nothing. Its results are in tensors of its own, which stay
        where they are, and it does not wait for the device.
    recorder : Recorder, optional
        None: every call is a plain one.
    """

    def __init__(self, step: Callable[..., None], recorder: Recorder | None = None) -> None:
        self._step = step
        self._recorder = recorder
        self._recordings: dict[Hashable, _Recording] = {}

    def __call__(self, inputs: Sequence[Tensor], mode: Hashable, ahead: int) -> None:
        """Do a step.

        Parameters
        ----------
        inputs : sequence of Tensor
        mode : hashable
            Handed to the step: what its operations depend on, other than shapes.
        ahead : int
            Steps of this mode and these shapes that come next, this one among them.
        """
        if self._recorder is None:
            return self._step(*inputs, mode)
        key = (mode, *(tensor.shape for tensor in inputs))
        recording = self._recordings.get(key)
        if recording is None:
            if ahead < WARM_UP + WORTH_IT or len(self._recordings) == MOST:
                return self._step(*inputs, mode)
            recording = self._recordings[key] = _Recording()
        if recording.replay is None and recording.warm < WARM_UP:
            # The warm-up is work to be done anyway: state is changed in place, once a step.
            recording.warm += 1
            return self._recorder.warm_up(lambda: self._step(*inputs, mode))
        if recording.replay is None:
            self._record(recording, inputs, mode)
        if recording.replay is None:
            return self._step(*inputs, mode)
        for static, tensor in zip(recording.inputs, inputs, strict=True):
            static.copy_(tensor)
        return recording.replay()

    def _record(self, recording: _Recording, inputs: Sequence[Tensor], mode: Hashable) -> None:
        assert self._recorder is not None
        static = tuple(torch.empty_like(tensor).copy_(tensor) for tensor in inputs)
        try:
            recording.replay = self._recorder.capture(lambda: self._step(*static, mode))
            recording.inputs = static
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # an operation of the network waits for the device
            log.warning("no CUDA graphs for this network: %s", str(error).splitlines()[0])
            self._recorder = None
