"""A whole training step as one compiled function, kept on disk from one run to the next.

PyTorch's ahead-of-time compiler makes a library of a step: forward, backward, clipping, and SGD
or Adam, with one vector for all parameters. It takes 15 to 40 s once, in a process of its own;
loading what it made takes milliseconds and imports no compiler.
"""

import hashlib
import inspect
import os
import pickle
import platform
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fedge_sim.errors import CannotCompileError
from fedge_sim.sealed import read_sealed, write_sealed
from fedge_sim.training import lowering, optimizer
from fedge_sim.training.base import TrainSettings
from fedge_sim.training.flat import FlatNetwork
from fedge_sim.training.optimizer import State

COMPILE_SECONDS = 1200  # at most
# Largest difference of a loaded step from plain PyTorch: the file must be this network's.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class StepSpec:
    """What a compiled step is made for; all else is an argument of it.

    Attributes
    ----------
    example_shape : tuple of int
    batch_size : int
    momentum, weight_decay, clip_norm, label_smoothing : float
        As in :class:`TrainSettings`.
    optimizer : {"sgd", "adam"}
    """

    example_shape: tuple[int, ...]
    batch_size: int
    momentum: float
    weight_decay: float
    clip_norm: float
    label_smoothing: float
    optimizer: str

    @classmethod
    def of(cls, settings: TrainSettings, example_shape: Sequence[int]) -> "StepSpec":
        """Return what the settings need for examples of this shape."""
        return cls(
            tuple(example_shape),
            settings.batch_size,
            settings.momentum,
            settings.weight_decay,
            settings.clip_norm,
            settings.label_smoothing,
            settings.optimizer,
        )


class Step:
    """One step on a batch of the full size, as a pure function of tensors.

    Parameters
    ----------
    flat : FlatNetwork
        Gives the names and shapes; its values are not used.
    spec : StepSpec
    """

    def __init__(self, flat: FlatNetwork, spec: StepSpec) -> None:
        self._flat, self._spec = flat, spec

    def __call__(
        self,
        vector: Tensor,
        momentum: Tensor,
        square: Tensor,
        steps: Tensor,
        start: Tensor,
        correction: Tensor,
        loss_sum: Tensor,
        lr: Tensor,
        prox_mu: Tensor,
        x: Tensor,
        y: Tensor,
        *others: Tensor,
    ) -> None:
        """Change the first four, the sum of losses and the network's other tensors in place.

        Parameters
        ----------
        vector, start, correction : Tensor (P,)
            Parameters, where training started, and what is added to the gradient after
            clipping.
        momentum, square, steps : Tensor
            What a :class:`State` has, of the vector.
        loss_sum : Tensor ()
            To which the losses of the batch's examples are added, without the proximal term.
        lr, prox_mu : Tensor ()
        x : Tensor (batch, *example_shape)
        y : int64 Tensor (batch,)
        *others : Tensor
            :attr:`FlatNetwork.others`.
        """
        spec, names = self._spec, list(self._flat.others)
        leaf = vector.detach().requires_grad_()
        others_now = [tensor.clone() for tensor in others]
        state = self._flat.named(leaf) | dict(zip(names, others_now, strict=True))
        logits = functional_call(self._flat.network, state, (x,))
        changed = [state[name] for name in names]  # the forward pass may have replaced them
        loss = functional.cross_entropy(logits, y, label_smoothing=spec.label_smoothing)
        (gradient,) = torch.autograd.grad(loss, leaf)
        with torch.no_grad():
            gradient = gradient + prox_mu * (vector - start)
            if spec.clip_norm > 0:
                norm = torch.linalg.vector_norm(gradient)
                gradient = gradient * (spec.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            gradient = gradient + correction + spec.weight_decay * vector
            if spec.optimizer == "adam":
                optimizer.adam_step(vector, gradient, lr, State(momentum, square, steps))
            else:
                momentum.copy_(spec.momentum * momentum + gradient)
                vector.copy_(vector - lr * momentum)
            loss_sum.copy_(loss_sum + loss * len(y))
            for tensor, new in zip(others, changed, strict=True):
                tensor.copy_(new)

    def arguments(self) -> list[Tensor]:
        """Return arguments of the right form, with values that a step can be tried on."""
        flat, spec, like = self._flat, self._spec, self._flat.vector
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=like.dtype)

        n = like.numel()
        classes = self._classes()
        _, square, steps = State.zero(like, spec.optimizer)
        return [
            0.1 * normal(n),
            0.01 * normal(n),
            square + 0.01,
            steps + 3,
            0.1 * normal(n),
            0.01 * normal(n),
            *[torch.tensor(0.1, dtype=like.dtype) for _ in range(3)],
            normal(spec.batch_size, *spec.example_shape),
            torch.randint(classes, (spec.batch_size,), generator=draw),
            *[tensor.clone() for tensor in flat.others.values()],
        ]

    def _classes(self) -> int:
        x = torch.zeros(2, *self._spec.example_shape, dtype=self._flat.vector.dtype)
        with torch.no_grad():
            state = {name: t.clone() for name, t in self._flat.all().items()}
            return int(functional_call(self._flat.network, state, (x,)).shape[1])


class CompiledStep:
    """A :class:`Step` from disk: called with the same arguments, all contiguous, on the CPU."""

    def __init__(self, file: Path) -> None:
        try:
            # The public loader imports the compiler: 2.7 s in every process.
            loader: Any = torch._C._aoti.AOTIModelPackageLoader
            self._run = loader(str(file), "model", False, 1, -1).run
        except (AttributeError, TypeError) as error:
            raise CannotCompileError(f"this torch cannot load a compiled step: {error}") from None

    def __call__(self, arguments: list[Tensor]) -> None:
        """Do a step in place."""
        self._run(arguments)


def compiled_step(flat: FlatNetwork, spec: StepSpec, folder: Path) -> CompiledStep:
    """Return the compiled step of a network; it is made where the folder does not have it.

    Parameters
    ----------
    flat : FlatNetwork
    spec : StepSpec
    folder : Path
        Of compiled steps; processes that need the same wait for the one that makes it.

    Raises
    ------
    CannotCompileError
        If there is no C++ compiler, or the network cannot be traced.
    """
    if flat.vector.device.type != "cpu":
        raise CannotCompileError("steps are compiled for a CPU only")
    step, file = Step(flat, spec), file_of(flat, spec, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):
            loaded = _load(file, step)
            if loaded is None:
                _compile_apart(flat, spec, torch.get_num_threads(), file)
                write_sealed(_seal_of(file), b"", _digest(file))
                loaded = _load(file, step)
            if loaded is None:
                file.unlink()
                raise CannotCompileError("the compiled step does not compute what the network does")
    except OSError as error:
        raise CannotCompileError(f"compiled steps cannot be kept: {error}") from None
    return loaded


def _load(file: Path, step: Step) -> CompiledStep | None:
    """Return the step in a file; None if there is none, or not one that does the same.

    A library runs in this process: it is loaded only if it is, byte for byte, what was compiled.
    """
    if not file.exists() or read_sealed(_seal_of(file), _digest(file)) is None:
        return None
    try:
        loaded = CompiledStep(file)
        return loaded if _is_same(step, loaded) else None
    except RuntimeError:  # damaged
        return None


def _seal_of(file: Path) -> Path:
    return file.with_suffix(".sealed")


def _digest(file: Path) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def file_of(flat: FlatNetwork, spec: StepSpec, folder: Path) -> Path:
    """Return where the compiled step of a network is kept: all it depends on is in the name."""
    parts = [
        torch.__version__,
        processor(),
        str(torch.get_num_threads()),
        repr(sorted(asdict(spec).items())),
        repr(flat.network),
        repr([(n, t.shape, t.dtype) for n, t in flat.all().items()]),
        repr(flat.names),
        *_sources(flat.network),
    ]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return folder / f"step-{digest[:24]}.pt2"


def processor() -> str:
    """Return what tells processors apart that cannot run each other's libraries."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        first = [next((x for x in lines if x.startswith(k)), "") for k in ("model name", "flags")]
        return "".join(first)
    return f"{platform.machine()} {platform.processor()} {torch.backends.cpu.get_cpu_capability()}"


def _sources(network: nn.Module) -> list[str]:
    """Return the files of the classes that a network is made of, and of ours; no library's."""
    classes = {type(module) for module in network.modules()} | {Step, FlatNetwork}
    own: list[Any] = [cls for cls in classes if not cls.__module__.startswith("torch.")]
    texts = set()
    for source in (lowering, optimizer, *own):
        try:
            texts.add(Path(inspect.getsourcefile(source) or "").read_text(encoding="utf-8"))
        except (OSError, TypeError):  # typed in, for example
            problem = f"{source.__name__} has no source file to know the network by"
            raise CannotCompileError(problem) from None
    return sorted(texts)


def _is_same(step: Step, loaded: CompiledStep) -> bool:
    """Whether a loaded step does what plain PyTorch does, on one batch."""
    plain, compiled = step.arguments(), step.arguments()
    step(*plain)
    loaded(compiled)
    return all(
        torch.allclose(a.double(), b.double(), rtol=TOLERANCE, atol=TOLERANCE)
        for a, b in zip(plain, compiled, strict=True)
    )


def _compile_apart(flat: FlatNetwork, spec: StepSpec, threads: int, file: Path) -> None:
    """Compile in a process of its own: the compiler's memory and threads end with it."""
    part = file.with_suffix(f".{os.getpid()}.part.pt2")
    try:
        order = pickle.dumps((flat.network, flat.names, spec, threads, str(part)))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise CannotCompileError(f"the network cannot be sent to the compiler: {error}") from None
    code = f"from {__name__} import serve; serve()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        child = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            input=order,
            capture_output=True,
            env=environment,
            timeout=COMPILE_SECONDS,
        )
        if child.returncode or not part.exists():
            said = child.stderr.decode(errors="replace").strip().splitlines()
            reason = said[-1] if said else f"exit code {child.returncode}"
            raise CannotCompileError(f"the step cannot be compiled: {reason}")
        part.replace(file)
    except subprocess.TimeoutExpired:
        raise CannotCompileError(f"compiling took over {COMPILE_SECONDS} s") from None
    finally:
        part.unlink(missing_ok=True)


def serve() -> None:
    """Compile what standard input asks for: the other side of :func:`compiled_step`.

    What goes wrong is the last line on standard error.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    network, names, spec, threads, target = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    step = Step(FlatNetwork(network, names), spec)
    try:
        arguments = step.arguments()
        graph = make_fx(step, lowering.DECOMPOSITIONS, tracing_mode="fake")(*arguments)
        exported = torch.export.export(graph, tuple(arguments)).run_decompositions({})
        lowering.mask_by_input(exported.graph_module)
        torch._inductor.aoti_compile_and_package(
            exported, package_path=target, inductor_configs=dict(lowering.OPTIONS)
        )
    except Exception as error:  # a network or a compiler may raise anything; it is reported
        first, *_ = str(error).strip().splitlines() or [""]
        sys.exit(f"{type(error).__name__}: {first}")
