"""FedRevive: what is stale in an update gives way to what recent clients' models teach.

Askin et al. 2025 (arXiv 2511.00655). The server has no examples: it distils from the models
themselves, on samples that a generator makes up, or on unlabelled ones of nobody in particular.
"""

import logging
import math
import zlib
from collections import deque
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedge_sim.algorithms import Arrays
from fedge_sim.algorithms.asynchronous import Update, beta_of, change, step
from fedge_sim.algorithms.distillation import Source, Teacher, Unlabelled, class_mix, distil
from fedge_sim.algorithms.generator import Generator
from fedge_sim.algorithms.synthesis import Synthesiser, statistics
from fedge_sim.config import Settings
from fedge_sim.errors import ConfigError, DataError
from fedge_sim.memory import trim
from fedge_sim.models import build_model, initialise
from fedge_sim.randomness import stream, torch_generator

# All that numpy and zipfile raise for a file that is something else, or damaged.
_UNREADABLE = (
    *(KeyError, TypeError, AttributeError, ValueError, EOFError, OSError, MemoryError),
    *(RuntimeError, SyntaxError, BadZipFile, zlib.error),
)

Network = TypeVar("Network", bound=nn.Module)
log = logging.getLogger(__name__)


class FedRevive:
    """The server's rule: x += server_lr * mean of (1 - beta) delta_i + beta kd_i.

    kd_i is how the server's model, its buffers included, changes when it is distilled from the
    clients' newest models; beta rises with the update's staleness. An update that comes to a
    server of less than ``freeze_versions`` versions is taken as it is; up to ``warmup_versions``
    the generator learns while nothing is distilled: kd_i is 0.

    Parameters
    ----------
    settings : Settings
    trainable : set of str
        The names of the model's parameters; all else are buffers.
    server : int
        Which one this is: a part of the name of its random streams.
    example_shape : tuple of int
    num_classes : int

    Raises
    ------
    ConfigError
        If no generator can be made for such examples, or if samples are to be like what
        networks have seen and these keep no statistics of it.
    DataError
        If the unlabelled examples cannot be read.
    """

    def __init__(
        self,
        settings: Settings,
        trainable: Set[str],
        server: int,
        example_shape: tuple[int, ...],
        num_classes: int,
    ) -> None:
        self._settings = settings
        self._trainable = trainable
        self._server = server
        self._shape = (example_shape, num_classes)
        gpu = settings.runtime.num_gpus_per_actor != 0 and torch.cuda.is_available()
        self._device = torch.device("cuda" if gpu else "cpu")
        own = settings.fedrevive
        self.teachers: deque[Teacher] = deque(maxlen=own.teacher_buffer_size)
        self.source: Source
        if own.variant == "light":
            x = unlabelled(Path(own.unlabelled_data), example_shape)
            self.source = Unlabelled(x, own, self._device)
        else:
            self._check_statistics()
            generator = Generator(example_shape, own.noise_size, own.generator_width)
            initialise(generator, torch_generator(settings.seed, "generator", server))
            self.source = Synthesiser(self._place(generator), own)
        self.skipped_steps = 0

    def make_version(self, model: Arrays, updates: Sequence[Update], version: int) -> Arrays:
        """Return the server's next model."""
        # As clients do, beside which it may run: the last bits depend on it, and MKL's number is
        # one for all threads of a process, so that nothing else may be set afterwards.
        torch.set_num_threads(self._settings.runtime.threads_per_client)
        changes = (self._change(model, update, version) for update in updates)
        lr = self._settings.hierarchy.server_lr
        return step(model, changes, updates[-1].arrays, lr, self._trainable)

    def _check_statistics(self) -> None:
        """Refuse a loss on statistics that no layer keeps."""
        name, weight = self._settings.data.model, self._settings.fedrevive.batch_norm
        layers = build_model(name, *self._shape).modules()
        if weight > 0 and all(statistics(layer) is None for layer in layers):
            raise ConfigError.at(
                *("fedrevive", "batch_norm", weight),
                f"is the weight of statistics that networks keep, and {name} keeps none: set 0.0, "
                f"or a model with BatchNorm or trackers (for images cnn2d-small, resnet18-tracked)",
            )

    def _change(self, model: Arrays, update: Update, version: int) -> Arrays:
        """Return what an update changes, after it has joined the teachers."""
        network = self._network(update.arrays)
        self.teachers.append(Teacher(network, class_mix(update.class_counts)))
        own, share = self._settings.fedrevive, beta_of(self._settings, update.staleness)
        completed = version - 1  # when the update came
        if completed < own.freeze_versions or not share:
            return change(model, update, 1.0, self._trainable)
        random = stream(self._settings.seed, "fedrevive", self._server, update.number)
        student = self._network(model).eval().requires_grad_(False)
        self.source.prepare(self.teachers, student, random)
        self._trim()
        raw = change(model, update, 1.0 - share, self._trainable)
        if completed <= own.warmup_versions:
            return raw
        distilled = self._distilled(model, random)
        return {
            name: array + share * distilled[name] if name in distilled else array
            for name, array in raw.items()
        }

    def _distilled(self, model: Arrays, random: np.random.Generator) -> Arrays:
        """Return kd_i, of parameters and buffers; integer ones have none."""
        student = self._network(model)
        lesson = self.source.lesson(self.teachers, random)
        losses = distil(student, lesson, self._settings.fedrevive)
        skipped = sum(map(math.isnan, losses))
        self._trim()
        if skipped:
            log.warning("%d steps of distillation skipped: not finite", skipped)
            self.skipped_steps += skipped
        return {
            name: tensor.cpu().numpy().astype(np.float64) - model[name]
            for name, tensor in student.state_dict().items()
            if tensor.is_floating_point()
        }

    def _trim(self) -> None:
        """Give memory back, of which each thread that makes versions would keep its own."""
        if self._device.type == "cpu":
            trim()

    def _network(self, arrays: Arrays) -> nn.Module:
        network = build_model(self._settings.data.model, *self._shape)
        network.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
        return self._place(network)

    def _place(self, network: Network) -> Network:
        """Move a network to where it computes, in the layout that is faster on a CPU too."""
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return network.to(self._device)

    def state(self) -> dict[str, Any]:
        """Return teachers and what their lessons are made of, as a checkpoint can hold it.

        What does not change any more is no copy.
        """
        return {
            "teachers": [
                {
                    "arrays": {n: t.cpu().numpy() for n, t in k.network.state_dict().items()},
                    "mix": k.mix,
                }
                for k in self.teachers
            ],
            "source": self.source.state(),
            "skipped_steps": self.skipped_steps,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Remember what another one of the same settings did: :meth:`state`."""
        self.teachers.clear()
        for own in state["teachers"]:
            self.teachers.append(Teacher(self._network(own["arrays"]), own["mix"]))
        self.source.restore(state["source"])
        self.skipped_steps = state["skipped_steps"]


def unlabelled(file: Path, example_shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Read ``x`` of an .npz file and standardise each channel by its own mean and deviation.

    Parameters
    ----------
    file : Path
    example_shape : tuple of int
        Of the clients' examples. ``x`` is (N, *example_shape), or has the channels last: images
        (N, height, width, channels), windows (N, samples, channels).

    Raises
    ------
    DataError
        If there is no such array, or it holds something else.
    """
    at = f'[fedrevive] unlabelled_data = "{file}"'
    try:
        with np.load(file, allow_pickle=False) as archive:
            x = archive["x"]
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{at}: must be an .npz file with an array x: {reason}") from None
    last = (*example_shape[1:], example_shape[0])  # with the channels last
    if x.shape[1:] == last != example_shape:
        x = np.moveaxis(x, -1, 1)
    if x.shape[1:] != example_shape or not len(x) or x.dtype.kind not in "fiu":
        raise DataError(
            f"{at}: x must be numbers (N, {', '.join(map(str, example_shape))}) as the clients' "
            f"examples are, not {x.dtype} {x.shape}"
        )
    axes = (0, *range(2, x.ndim))
    mean = x.mean(axes, np.float64, keepdims=True)
    std = x.std(axes, np.float64, keepdims=True)
    if not np.isfinite(std).all():
        raise DataError(f"{at}: x holds NaN or infinity, or values too large")
    return np.asarray((x - mean) / np.where(std > 0, std, 1.0), np.float32)
