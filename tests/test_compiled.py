"""Compiled steps: kept between runs, checked when loaded, done without where they cannot be had."""

import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fedge_sim.data.base import Examples, Standardisation
from fedge_sim.errors import CannotCompileError
from fedge_sim.models import build_model, initialise
from fedge_sim.randomness import stream, torch_generator
from fedge_sim.training import compiled, lowering, optimizer
from fedge_sim.training.base import ClientTask, TrainSettings, model_arrays
from fedge_sim.training.compiled import StepSpec, compiled_step, file_of
from fedge_sim.training.flat import FlatNetwork
from fedge_sim.training.local import Reference
from fedge_sim.training.single import Single

SHAPE = (2, 3)
SPEC = StepSpec.of(TrainSettings(lr=0.1, batch_size=4), SHAPE)


class Tiny(nn.Module):
    def __init__(self, width: int = 3):
        super().__init__()
        self.head = nn.Linear(6, width)

    def forward(self, x):
        return self.head(x.flatten(1))


class Counts(Tiny):
    """Puts new tensors in the place of its buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return super().forward(x)


class Asks(Tiny):
    """Cannot be traced: what it computes depends on a value."""

    def forward(self, x):
        return self.head(x.flatten(1) if x.sum() > 0 else -x.flatten(1))


def local() -> type[Tiny]:
    class Inside(Tiny):
        """Nobody else can import it."""

    return Inside


Local = local()


def flat_of(network: nn.Module) -> FlatNetwork:
    return FlatNetwork(network, [name for name, _ in network.named_parameters()])


def task_of(network: nn.Module, n: int = 12) -> ClientTask:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, *SHAPE)).astype(np.float32)
    examples = Examples(x, rng.integers(3, size=n), Standardisation.identity(2))
    settings = TrainSettings(lr=0.1, batch_size=4, local_epochs=1)
    return ClientTask(model_arrays(network), examples, np.arange(n), settings, stream(0, "x"))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """A compiled step is one for a number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the compiled step of Tiny."""
    folder = tmp_path_factory.mktemp("steps")
    compiled_step(flat_of(Tiny()), SPEC, folder)
    return folder


@pytest.fixture
def no_compiler(monkeypatch):
    def refuse(*args):
        raise AssertionError("compiled anew")

    monkeypatch.setattr(compiled, "_compile_apart", refuse)


def test_a_step_is_made_once_for_all_processes(made, no_compiler):
    [file] = made.glob("*.pt2")
    before = file.stat().st_mtime_ns
    [update] = Single(Tiny(), made).train([task_of(Tiny())])
    assert update.path == "compiled"
    code = (
        "import sys; from tests.test_compiled import *\n"
        f"Single(Tiny(), Path({str(made)!r})).train([task_of(Tiny())])\n"
        "print('torch._dynamo' in sys.modules, 'torch._inductor' in sys.modules)"
    )
    code = "from pathlib import Path\nimport torch\ntorch.set_num_threads(1)\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]  # which would take seconds to import
    assert file.stat().st_mtime_ns == before
    assert [f.suffix for f in sorted(made.iterdir())] == [".lock", ".pt2", ".sealed"]


def test_the_name_holds_all_that_a_step_depends_on(tmp_path, monkeypatch):
    def name(network=None, spec=SPEC):
        return file_of(flat_of(network or Tiny()), spec, tmp_path).name

    class Other(Tiny):
        """The same parameters, written down in another file."""

    Other.__module__ = nn.Linear.__module__
    names = [
        name(),
        name(Tiny(4)),
        name(Tiny().double()),
        name(Asks()),
        *(name(spec=replace(SPEC, **{key: 7})) for key in vars(SPEC) if key != "example_shape"),
        name(spec=replace(SPEC, example_shape=(3, 2))),
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    names.append(name())
    torch.set_num_threads(threads)
    monkeypatch.setattr(compiled, "processor", lambda: "another")
    names.append(name())
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "0")
    names.append(name())
    monkeypatch.undo()
    for module in (lowering, optimizer):
        monkeypatch.setattr(module, "__file__", __file__)
        names.append(name())
        monkeypatch.undo()
    assert len(set(names)) == len(names)
    assert name() == names[0]


def test_a_step_of_another_network_is_not_used(made, monkeypatch, caplog):
    """The file has the right name, but was made for other settings; and so is what replaces it."""
    calls = []
    monkeypatch.setattr(compiled, "_compile_apart", lambda *args: calls.append(args))
    [file] = made.glob("*.pt2")
    other = replace(SPEC, momentum=0.1)
    wrong = file_of(flat_of(Tiny()), other, made)
    os.link(file, wrong)
    network = Tiny()
    task = task_of(network)
    task = replace(task, settings=replace(task.settings, momentum=0.1))
    with caplog.at_level(logging.WARNING):
        [update] = Single(Tiny(), made).train([task])
    assert update.path == "single"
    assert "does not compute what the network does" in caplog.text
    assert len(calls) == 1
    assert not wrong.exists()


@pytest.mark.parametrize("damage", [b"", b"no library"])
def test_a_damaged_file_is_made_anew(made, tmp_path, damage, monkeypatch):
    [good] = made.glob("*.pt2")
    file = file_of(flat_of(Tiny()), SPEC, tmp_path)
    file.write_bytes(damage)

    def again(flat, spec, threads, target):
        target.write_bytes(good.read_bytes())

    monkeypatch.setattr(compiled, "_compile_apart", again)
    compiled_step(flat_of(Tiny()), SPEC, tmp_path)
    assert file.read_bytes() == good.read_bytes()


def test_a_damaged_library_is_not_even_loaded(made, tmp_path, monkeypatch, caplog):
    """It would run in this process, with whatever its bytes came to be."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    [file] = tmp_path.glob("*.pt2")
    whole, loaded, compiled_anew = file.read_bytes(), [], []
    load = compiled.CompiledStep
    monkeypatch.setattr(
        compiled, "CompiledStep", lambda f: loaded.append(f.read_bytes()) or load(f)
    )

    def again(flat, spec, threads, target):
        compiled_anew.append(target)
        target.write_bytes(whole)

    monkeypatch.setattr(compiled, "_compile_apart", again)
    compiled_step(flat_of(Tiny()), SPEC, tmp_path)
    assert (loaded, compiled_anew) == ([whole], [])
    rng = np.random.default_rng(0)
    for number in range(1, 13):
        content = bytearray(whole)
        place = int(rng.integers(len(whole)))
        if number % 3:
            content[place] ^= 1 << int(rng.integers(8))
        else:
            del content[place:]
        file.write_bytes(content)
        caplog.clear()
        compiled_step(flat_of(Tiny()), SPEC, tmp_path)
        assert set(loaded) == {whole}
        assert len(compiled_anew) == number
        assert "is damaged; it is made anew" in caplog.text


@pytest.mark.parametrize(
    ("network", "environment", "reason"),
    [
        (Asks, {}, "cannot be compiled: .*data-dependent"),
        (Tiny, {"CXX": "/nowhere/c++"}, "cannot be compiled: .*/nowhere/c"),
        (Local, {}, "cannot be sent to the compiler"),
        (type("Here", (Tiny,), {"__module__": "nowhere"}), {}, "Here has no source file"),
    ],
)
def test_without_a_compiled_step_training_goes_on(
    tmp_path, monkeypatch, caplog, network, environment, reason
):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    path = Single(network(), tmp_path)
    with caplog.at_level(logging.WARNING):
        updates = [path.train([task_of(network())])[0] for _ in range(2)]
    assert [update.path for update in updates] == ["single", "single"]
    [record] = caplog.records  # said once
    assert re.search(reason, record.getMessage())
    assert not list(tmp_path.glob("*.pt2"))


def test_accumulated_batches_are_not_compiled(made, no_compiler):
    task = task_of(Tiny())
    task = replace(task, settings=replace(task.settings, accumulation=2))
    [update] = Single(Tiny(), made).train([task])
    assert update.path == "single"


def test_two_ways_of_one_model_have_steps_of_their_own():
    models = [build_model("mlp", (6, 20), classes) for classes in (3, 4)]
    for model in models:
        initialise(model, torch_generator(0, "test"))
    assert repr(models[0]) != repr(models[1])


def test_a_buffer_that_is_replaced(tmp_path):
    task = task_of(Counts(), n=14)  # three full batches and a short one, in each of two epochs
    task = replace(task, settings=replace(task.settings, local_epochs=2))
    [ours] = Single(network := Counts(), tmp_path).train([task])
    assert ours.path == "compiled"
    assert ours.arrays["calls"] == 8
    [plain] = Reference(network).train([replace(task, order=stream(0, "x"))])
    assert ours.loss == pytest.approx(plain.loss, rel=1e-5)


def test_steps_are_compiled_for_a_cpu(tmp_path):
    flat = flat_of(Tiny())
    flat.vector = flat.vector.to("meta")
    with pytest.raises(CannotCompileError, match="for a CPU only"):
        compiled_step(flat, SPEC, tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CannotCompileError, match="cannot be kept"):
        compiled_step(flat_of(Tiny()), SPEC, tmp_path / "file" / "folder")


def test_parameters_of_several_types_are_refused():
    network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double())
    with pytest.raises(TypeError, match="several types"):
        flat_of(network)
