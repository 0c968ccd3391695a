"""Every way to train gives what the plain one gives: one test for all, and what is special."""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fedge_sim.data.base import CPU, Examples, Resident, ResidentExamples, Standardisation
from fedge_sim.errors import CannotVectoriseError
from fedge_sim.models import MODELS, build_model, initialise
from fedge_sim.models.tracker import Tracker
from fedge_sim.randomness import torch_generator
from fedge_sim.training.base import (
    ClientTask,
    ClientUpdate,
    TrainingPath,
    TrainSettings,
    model_arrays,
)
from fedge_sim.training.batches import Plan, feed
from fedge_sim.training.cohort import Cohort
from fedge_sim.training.graphs import MOST, WARM_UP, WORTH_IT, Replayer
from fedge_sim.training.local import Reference
from fedge_sim.training.single import Single
from fedge_sim.training.vectorised import Vectorised

CLASSES = 5
WINDOW = (3, 12)

# Every way to train but the plain one: from a network to what trains clients with it.
PATHS: dict[str, Callable[[nn.Module], TrainingPath]] = {"single": Single, "cohort": Cohort}

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}
NETWORKS = (*MODELS, "own")
# Adam divides by what a gradient usually is: in float32, what is left of a tiny one in a large
# network differs by more than the tolerance.
WITH_ADAM = [
    (path, model, dtype, "adam")
    for path, model, dtype in product(PATHS, NETWORKS, TOLERANCE)
    if dtype == torch.float64 or model not in ("cnn2d", "resnet18", "resnet18-tracked")
]
# To compile takes a quarter of a minute, and a whole one for ResNet-18, whose trackers "own" has.
COMPILED = [
    *(("compiled", m, torch.float32, "sgd") for m in NETWORKS if m != "resnet18-tracked"),
    *(("compiled", model, torch.float64, "sgd") for model in ("cnn1d", "own")),
    *(("compiled", "own", dtype, "adam") for dtype in TOLERANCE),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For small tensors, where more threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Own(nn.Module):
    """A network of a user's: both kinds of BatchNorm, trackers, its own layer, a tied weight."""

    def __init__(self, momentum: float | None = 0.1, tracks: bool = True, affine: bool = True):
        super().__init__()
        how = {"momentum": momentum, "track_running_stats": tracks, "affine": affine}
        self.conv = nn.Conv2d(1, 4, 3)
        self.over_places = nn.BatchNorm2d(4, **how)
        self.watched, self.watched_rows = Tracker(4), Tracker(4)
        self.scale = nn.Parameter(torch.ones(1, 4, 1, 1))
        self.hidden = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.hidden.weight
        self.over_rows = nn.BatchNorm1d(4, **how)
        self.head = nn.Linear(4, CLASSES)
        self.unused = nn.Linear(2, 2)
        self.frozen = nn.Parameter(torch.full((4,), 0.5), requires_grad=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("places", torch.linspace(-1, 1, 4), persistent=False)

    def forward(self, x):
        self.calls += 1
        x = self.watched(self.conv(x.unsqueeze(1)))
        x = torch.tanh(self.over_places(x) * self.scale).mean(dim=(2, 3))
        x = self.again(self.hidden(x + self.places)).contiguous(memory_format=torch.preserve_format)
        x = self.watched_rows(x)
        return self.head(torch.tanh(self.over_rows(x)) + self.frozen)


def shape_of(name: str) -> tuple[int, ...]:
    if MODELS.get(name) is None or MODELS[name].num_axes != 3:
        return WINDOW
    return (3, 4, 4) if "resnet18" in name else (3, 8, 8)


def network_of(name: str, dtype: torch.dtype = torch.float64, **how) -> nn.Module:
    if name == "own":
        with torch.random.fork_rng([]):
            torch.manual_seed(3)
            return Own(**how).to(dtype)
    network = build_model(name, shape_of(name), CLASSES)
    initialise(network, torch_generator(0, "test"))
    return network.to(dtype)


def examples_of(shape: tuple[int, ...], n: int = 80, seed: int = 1) -> Examples:
    rng = np.random.default_rng(seed)
    y = rng.integers(CLASSES, size=n)
    x = 2 + 3 * rng.normal(size=(n, *shape)) + y.reshape(-1, *[1] * len(shape))
    x = x.astype(np.float32)
    return Examples(x, y, Standardisation.of(x, np.arange(n)))


EVERYTHING = TrainSettings(
    lr=0.05,
    local_epochs=2,
    batch_size=8,
    momentum=0.9,
    weight_decay=0.01,
    clip_norm=0.5,
    label_smoothing=0.1,
    prox_mu=0.1,
)


def uneven(
    network: nn.Module,
    shape: tuple[int, ...],
    sizes: Sequence[int] = (5, 19, 16, 9),
    settings: TrainSettings = EVERYTHING,
    correct: bool = True,
) -> list[ClientTask]:
    """Clients of several sizes, rates, proximal terms and corrections, some of one start.

    Of the default sizes, 5 is one short batch, 19 has a short last one, 16 none, and 9 leaves
    a row over.
    """
    examples = examples_of(shape, max(80, sum(sizes)))
    rng = np.random.default_rng(5)
    first = model_arrays(network)
    for name, p in network.named_parameters():
        if p.dim() == 1:  # as in a model on its way: at 0, an update's float error is all there is
            first[name] += 0.1 * rng.normal(size=p.shape).astype(first[name].dtype)
    second = {n: (a * 0.9).astype(a.dtype) if a.dtype.kind == "f" else a for n, a in first.items()}
    tasks, rows = [], np.split(rng.permutation(len(examples.y)), np.cumsum(sizes))
    for i, _ in enumerate(sizes):
        own = replace(settings, lr=settings.lr * (1 + i / 4), prox_mu=settings.prox_mu * (i % 2))
        correction = {
            name: 0.01 * rng.normal(size=p.shape) for name, p in network.named_parameters()
        }
        tasks.append(
            ClientTask(
                start=second if i % 3 == 2 else first,
                examples=examples,
                rows=rows[i],
                settings=own,
                order=np.random.default_rng(i),
                correction=correction if correct and i != 1 else None,
            )
        )
    return tasks


def anew(tasks: Sequence[ClientTask]) -> list[ClientTask]:
    """The same tasks, whose generators have not yet drawn."""
    return [replace(task, order=np.random.default_rng(i)) for i, task in enumerate(tasks)]


def assert_same(
    ours: Sequence[ClientUpdate], theirs: Sequence[ClientUpdate], name: str, tolerance: float
) -> None:
    assert [update.path for update in ours] == [name] * len(theirs)  # no silent way around
    for one, other in zip(ours, theirs, strict=True):
        assert list(one.arrays) == list(other.arrays)
        for key, expected in other.arrays.items():
            got = one.arrays[key]
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape), key
            assert isinstance(got, np.ndarray), key
            largest = np.abs(expected).max(initial=0)
            assert np.abs(got - expected).max(initial=0) <= tolerance * largest, key
        assert one.steps == other.steps
        # The reference sums losses in float32, whose last digit is 1.2e-7 of a value, and many
        # layers add to what the arrays differ by.
        assert one.loss == pytest.approx(other.loss, rel=max(10 * tolerance, 1e-6))
        assert one.seconds >= 0


def assert_as_reference(
    tasks: Sequence[ClientTask],
    make: Callable[[], nn.Module],
    name: str = "cohort",
    path: Callable[[nn.Module], TrainingPath] | None = None,
) -> list[ClientUpdate]:
    network = make()
    tolerance = TOLERANCE[next(network.parameters()).dtype]
    updates = (path or PATHS[name])(network).train(anew(tasks))
    assert_same(updates, Reference(make()).train(anew(tasks)), name, tolerance)
    return updates


def every_path(test):
    return pytest.mark.parametrize("path", PATHS)(test)


# ------------------------------------------------------------- all ways are the same


def of_all_that_there_is(model: str, dtype: torch.dtype, optimizer: str) -> list[ClientTask]:
    """A round with FedProx, momentum or Adam, decay, clipping, SCAFFOLD, two epochs."""
    large = "resnet18" in model
    settings = replace(EVERYTHING, batch_size=4, lr=0.01) if large else EVERYTHING
    if optimizer == "adam":
        settings = replace(settings, optimizer="adam", lr=1e-4)
    sizes = (6, 3) if large else (5, 19, 16, 9)
    return uneven(network_of(model, dtype), shape_of(model), sizes, settings)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """The folder of compiled steps, all made in advance: compilers side by side."""
    folder = tmp_path_factory.mktemp("steps")

    def make(kind: tuple[str, str, torch.dtype, str]) -> None:
        torch.set_num_threads(1)
        _, model, dtype, optimizer = kind
        tasks = of_all_that_there_is(model, dtype, optimizer)
        Single(network_of(model, dtype), folder).train(tasks[:1])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(make, COMPILED))
    return folder


@pytest.mark.parametrize(
    ("path", "model", "dtype", "optimizer"),
    [*product(PATHS, NETWORKS, TOLERANCE, ["sgd"]), *WITH_ADAM, *COMPILED],
)
def test_a_round_of_uneven_clients(path, model, dtype, optimizer, request):
    tasks, how = of_all_that_there_is(model, dtype, optimizer), PATHS.get(path)
    if path == "compiled":
        how = partial(Single, compiled=request.getfixturevalue("steps"))
    updates = assert_as_reference(tasks, lambda: network_of(model, dtype), path, how)
    start, end = tasks[0].start, updates[0].arrays
    assert all(not np.array_equal(start[key], end[key]) for key in start if "head" in key)


@every_path
@pytest.mark.parametrize("model", ["mlp", "own"])
@pytest.mark.parametrize(
    "change",
    [
        {"accumulation": 2},
        {"accumulation": 3, "local_steps": 3},
        {"local_steps": 4},
        {"local_steps": 1},
        {"local_epochs": 0},
        {"momentum": 0.0},
        {"clip_norm": 0.0},
        {"weight_decay": 0.0},
        {"prox_mu": 0.0},
        {"label_smoothing": 0.0},
        {"batch_size": 64},
        {"optimizer": "adam"},
        {"optimizer": "adam", "accumulation": 2, "clip_norm": 0.0},
    ],
    ids=str,
)
def test_a_change_of_settings(path, model, change):
    network = network_of(model)
    tasks = uneven(network, WINDOW, settings=replace(EVERYTHING, **change), correct=False)
    assert_as_reference(tasks, lambda: network_of(model), path)


@every_path
@pytest.mark.parametrize("how", [{"momentum": None}, {"tracks": False}, {"affine": False}], ids=str)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_kinds_of_batch_norm(path, how, accumulation):
    network = network_of("own", **how)
    tasks = uneven(network, WINDOW, settings=replace(EVERYTHING, accumulation=accumulation))
    assert_as_reference(tasks, lambda: network_of("own", **how), path)


@every_path
def test_a_batch_norm_that_does_not_train(path):
    class Stays(Own):
        def train(self, mode=True):
            super().train(mode)
            self.over_rows.eval()
            return self

    network = Stays().double()
    assert_as_reference(uneven(network, WINDOW), lambda: Stays().double(), path)


@every_path
def test_what_gets_no_gradient_stays(path):
    tasks = uneven(network_of("own"), WINDOW)
    for task, update in zip(
        tasks, assert_as_reference(tasks, lambda: network_of("own"), path), strict=True
    ):
        for name in ("unused.weight", "unused.bias", "frozen"):
            assert np.array_equal(update.arrays[name], task.start[name])
        assert np.array_equal(update.arrays["again.weight"], update.arrays["hidden.weight"])


@every_path
def test_running_statistics_are_each_clients_own(path):
    tasks = uneven(network_of("own"), WINDOW)
    updates = assert_as_reference(tasks, lambda: network_of("own"), path)
    counts = [int(update.arrays["over_rows.num_batches_tracked"]) for update in updates]
    assert counts == [int(update.arrays["calls"]) for update in updates] == [2, 6, 4, 2]
    assert counts == [update.steps for update in updates]
    means = [update.arrays["over_places.running_mean"] for update in updates]
    assert all(not np.allclose(one, other) for one, other in pairwise(means))


@every_path
def test_each_client_has_its_own_scale(path):
    tasks = uneven(network_of("mlp"), WINDOW)
    common = tasks[0].examples
    tasks = [
        replace(task, examples=replace(common, scale=Standardisation.of(common.x, task.rows)))
        for task in tasks
    ]
    assert_as_reference(tasks, lambda: network_of("mlp"), path)


@every_path
def test_each_client_has_its_own_dataset(path):
    tasks = uneven(network_of("mlp"), WINDOW)
    tasks = [
        replace(task, examples=examples_of(WINDOW, seed=seed)) for seed, task in enumerate(tasks)
    ]
    assert_as_reference(tasks, lambda: network_of("mlp"), path)


@every_path
def test_examples_that_a_device_holds(path):
    tasks = uneven(network_of("mlp"), WINDOW)
    there = Resident(torch.from_numpy(tasks[0].examples.x), torch.from_numpy(tasks[0].examples.y))
    tasks = [
        replace(task, examples=ResidentExamples(**vars(task.examples), resident=there))
        for task in tasks
    ]
    assert_as_reference(tasks, lambda: network_of("mlp"), path)
    assert torch.equal(there.x, torch.from_numpy(tasks[0].examples.x))  # as raw as before


@every_path
def test_one_client_alone(path):
    tasks = uneven(network_of("own"), WINDOW, [19])
    assert_as_reference(tasks, lambda: network_of("own"), path)


@every_path
@pytest.mark.parametrize("sizes", [[1, 9], [1], [2, 2, 17], [0, 9], [0]], ids=str)
@pytest.mark.parametrize("model", ["mlp", "cnn1d"])
@pytest.mark.parametrize("local_steps", [0, 3])
def test_clients_of_few_rows(path, sizes, model, local_steps):
    settings = replace(EVERYTHING, local_steps=local_steps)
    tasks = uneven(network_of(model), WINDOW, sizes, settings)
    updates = assert_as_reference(tasks, lambda: network_of(model), path)
    for size, task, update in zip(sizes, tasks, updates, strict=True):
        if size == 0:
            assert (update.steps, update.loss) == (0, 0)
            assert all(np.array_equal(task.start[name], a) for name, a in update.arrays.items())


@every_path
def test_in_bfloat16(path):
    """The forward pass alone: parameters, loss and momentum stay what they are."""
    tasks = uneven(network_of("mlp", torch.float32), WINDOW)
    kind = type(PATHS[path](network_of("mlp")))
    for make in (kind, Reference):
        half = make(network_of("mlp", torch.float32), autocast=torch.bfloat16).train(anew(tasks))
        full = Reference(network_of("mlp", torch.float32)).train(anew(tasks))
        for one, other in zip(half, full, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=0.05)
            assert one.loss != other.loss
            assert all(one.arrays[n].dtype == other.arrays[n].dtype for n in other.arrays)


@every_path
def test_no_clients(path):
    assert PATHS[path](network_of("mlp")).train([]) == []


@every_path
def test_one_row_is_too_few_for_batch_norm(path):
    tasks = uneven(network_of("own"), WINDOW, [9, 1])
    for trainer in (Reference(network_of("own")), PATHS[path](network_of("own"))):
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            trainer.train(anew(tasks))


@every_path
def test_a_path_can_train_again(path):
    """What earlier clients left behind, also fewer or more of them, changes nothing."""
    network = network_of("own")
    trainer = PATHS[path](network)
    for sizes in ([19, 9], [5, 19, 16, 9], [19, 9]):
        tasks = uneven(network, WINDOW, sizes)
        right = Reference(network_of("own")).train(anew(tasks))
        assert_same(trainer.train(anew(tasks)), right, path, 1e-9)


@every_path
@given(sizes=st.lists(st.integers(1, 21), min_size=1, max_size=6), parts=st.integers(1, 3))
@hypothesis_settings(max_examples=25)
def test_clients_of_any_sizes(path, sizes, parts):
    settings = replace(EVERYTHING, batch_size=4, accumulation=parts)
    tasks = uneven(network_of("mlp"), WINDOW, sizes, settings)
    assert_as_reference(tasks, lambda: network_of("mlp"), path)


# ---------------------------------------------------------------------- side by side


def test_the_callers_network_stays_as_it_is():
    network = network_of("own")
    before, forward = model_arrays(network), network.over_rows.forward
    Cohort(network.eval()).train(uneven(network, WINDOW))
    assert not network.over_rows.training
    assert network.over_rows.forward == forward
    assert all(np.array_equal(before[name], a) for name, a in model_arrays(network).items())


def test_updates_are_copies():
    tasks = uneven(network_of("mlp"), WINDOW)
    updates = Cohort(network_of("mlp")).train(anew(tasks))
    again = [{name: a.copy() for name, a in update.arrays.items()} for update in updates]
    for array in updates[0].arrays.values():
        array.fill(np.nan)
    for update, copies in list(zip(updates, again, strict=True))[1:]:
        assert all(np.array_equal(update.arrays[name], a) for name, a in copies.items())
    assert np.isfinite(tasks[0].start["head.weight"]).all()


def test_time_is_shared_by_examples():
    with mock.patch("time.perf_counter", side_effect=[10.0, 14.0]):
        updates = Cohort(network_of("mlp")).train(uneven(network_of("mlp"), WINDOW, [4, 12]))
    assert [update.seconds for update in updates] == [1.0, 3.0]


def test_settings_that_differ_are_refused():
    tasks = uneven(network_of("mlp"), WINDOW)
    tasks[1] = replace(tasks[1], settings=replace(tasks[1].settings, momentum=0.5, clip_norm=2.0))
    with pytest.raises(ValueError, match=r"not in clip_norm, momentum$"):
        Cohort(network_of("mlp")).train(tasks)


def test_another_networks_arrays_are_refused():
    tasks = uneven(network_of("mlp"), WINDOW)
    with pytest.raises(RuntimeError, match="state_dict"):
        Cohort(network_of("own")).train(tasks)


@pytest.mark.parametrize("fixed_width", [False, True])
def test_batches_are_those_of_the_reference(fixed_width):
    """To the last bit, and in its order; the client with most steps comes first."""
    tasks = uneven(network_of("mlp"), WINDOW, settings=replace(EVERYTHING, accumulation=2))
    plan = Plan.of(anew(tasks))
    assert plan.order == [1, 0, 2, 3]
    ordered = [tasks[i] for i in plan.order]
    gather = feed(plan, [task.examples for task in ordered], CPU)
    seen = {i: [] for i in range(len(tasks))}
    for tick in plan.ticks(fixed_width):
        x, y = gather(tick)
        assert x.shape == (tick.batches, tick.clients, tick.width, *WINDOW)
        assert tick.width == 8 or not fixed_width
        for j in range(tick.batches):
            for place in range(tick.clients):
                length = plan.lengths[tick.number, j, place]
                if length:
                    seen[plan.order[place]].append((x[j, place, :length], y[j, place, :length]))
    spied = Spied(network_of("mlp"))
    for i, task in enumerate(anew(tasks)):
        spied.seen.clear()
        Reference(spied.network).train([task])
        assert len(spied.seen) == len(seen[i])
        for theirs, (x, _) in zip(spied.seen, seen[i], strict=True):
            assert torch.equal(theirs, x.double())


class Spied:
    """Keeps every batch that a network sees."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.seen = network, []
        network.register_forward_pre_hook(lambda _, args: self.seen.append(args[0]))


def test_filling_up_is_a_clients_own():
    """Whatever other examples hold, also no numbers, a client does not see it."""
    tasks = uneven(network_of("own"), WINDOW)
    right = Reference(network_of("own")).train(anew(tasks))
    old = tasks[0].examples
    x = np.concatenate([np.full_like(old.x[:1], np.nan), old.x])  # the first is nobody's
    examples = replace(old, x=x, y=np.concatenate([[0], old.y]))
    moved = [replace(task, examples=examples, rows=task.rows + 1) for task in tasks]
    assert_same(Cohort(network_of("own")).train(anew(moved)), right, "cohort", 1e-9)


def test_half_precision_of_the_forward_pass():
    """Near the result of full precision, and not the same."""
    for model in ("cnn1d", "own"):
        network = network_of(model, torch.float32)
        tasks = uneven(network, WINDOW)
        half = Cohort(network, autocast=torch.bfloat16).train(anew(tasks))
        full = Cohort(network).train(anew(tasks))
        for one, other in zip(half, full, strict=True):
            ours, theirs = one.arrays["head.weight"], other.arrays["head.weight"]
            assert ours.dtype == np.float32
            assert not np.array_equal(ours, theirs)
            np.testing.assert_allclose(ours, theirs, atol=0.05)


# ----------------------------------------------------------- what cannot be vectorised


class Head(nn.Module):
    """A linear head below something that a test is about."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x):
        return self.head(self.change(x.mean(dim=1)))


class Mixes(Head):
    def change(self, x):
        return x - x.mean(dim=0)


class Drops(Head):
    def change(self, x):
        return functional.dropout(x, 0.5, self.training)


class Decides(Head):
    def change(self, x):
        return x if x.sum() > 0 else -x


class Counts(Head):
    def change(self, x):
        return x * float(x.sum())


class Draws(Head):
    def change(self, x):
        return x * float(np.random.default_rng().random())


class SinglePrecision(Head):
    """Would fail in double precision, and is checked in its own."""

    def change(self, x):
        return x.float()


class Broken(Head):
    def change(self, x):
        return x[:, :7]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Mixes, "mix the rows of a batch"),
        (Drops, "Drops: vmap: called random operation"),
        (Decides, "Decides: vmap: .*data-dependent control flow"),
        (Counts, r"Counts: vmap: .*\.item\(\)"),
        (Draws, "draw random numbers"),
        (Broken, "mat1 and mat2 shapes"),
    ],
)
def test_what_cannot_be_vectorised_is_told(kind, reason):
    network, state = kind(), torch.random.get_rng_state()
    with pytest.raises(CannotVectoriseError, match=reason):
        Cohort(network).check(WINDOW, CLASSES)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("network", ["mlp", "cnn2d", "own", "single"])
def test_what_can_be_vectorised_passes(network):
    network = SinglePrecision() if network == "single" else network_of(network, torch.float32)
    shape = (3, 8, 8) if hasattr(network, "conv2") else WINDOW
    before = model_arrays(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(torch.nan)  # as its values may be any
    Cohort(network).check(shape, CLASSES)
    assert before.keys() == model_arrays(network).keys()


def test_a_network_without_one_dtype_is_refused():
    network = Head()
    network.head.bias.data = network.head.bias.data.double()
    with pytest.raises(CannotVectoriseError, match="one dtype, found"):
        Cohort(network)
    with pytest.raises(CannotVectoriseError, match="one dtype"):
        Cohort(nn.Flatten())


def test_a_network_that_cannot_be_copied_is_refused():
    network = Head()
    network.lock = (i for i in range(3))
    with pytest.raises(CannotVectoriseError, match=r"cannot be copied: .*generator"):
        Cohort(network)


def test_a_forward_pass_of_ones_own_below_batch_norm_is_left_alone():
    class Doubled(nn.BatchNorm1d):
        def forward(self, x):
            return 2 * x

    network = Vectorised(nn.Sequential(Doubled(2)))
    x = torch.ones(3, 4, 2)
    logits, _ = network({}, x, torch.ones(3, 4, dtype=torch.bool), False)
    assert torch.equal(logits, 2 * x)


# ----------------------------------------------------------------------- recordings


class StandIn:
    """Records calls on a CPU: as with a CUDA graph, nothing runs when captured."""

    def __init__(self) -> None:
        self.events: Counter[str] = Counter()
        self.capturing = False

    def warm_up(self, call):
        self.events["warm"] += 1
        call()

    def capture(self, call):
        self.events["captured"] += 1

        def replay():
            self.events["replayed"] += 1
            call()

        return replay


@pytest.mark.parametrize("model", ["mlp", "own"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_recorded_steps_are_the_same(model, optimizer):
    """A round of many steps and one with other data: the second uses the first's recordings."""
    network, recorder = network_of(model), StandIn()
    cohort = Cohort(network, recorder=recorder)
    lr = {"sgd": EVERYTHING.lr, "adam": 1e-3}[optimizer]
    settings = replace(EVERYTHING, local_epochs=40, optimizer=optimizer, lr=lr)
    for seed in (1, 2):
        tasks = uneven(network, WINDOW, settings=settings)
        tasks = [replace(task, examples=examples_of(WINDOW, seed=seed)) for task in tasks]
        right = Reference(network_of(model)).train(anew(tasks))
        assert_same(cohort.train(anew(tasks)), right, "cohort", 1e-8)
        assert recorder.events["captured"] > 1
        if seed == 1:
            once = recorder.events.copy()
    assert recorder.events["captured"] == once["captured"]
    assert recorder.events["warm"] == once["warm"] == WARM_UP * once["captured"]
    assert recorder.events["replayed"] > 2 * once["replayed"]
    changed = [replace(task, settings=replace(task.settings, clip_norm=0.2)) for task in tasks]
    right = Reference(network_of(model)).train(anew(changed))
    assert_same(cohort.train(anew(changed)), right, "cohort", 1e-8)
    assert recorder.events["captured"] > once["captured"]


def add_to(total: torch.Tensor) -> Callable[..., None]:
    def step(x, mode):
        total.add_(x * mode)

    return step


def test_replays_read_the_inputs_anew():
    total, recorder = torch.zeros(2), StandIn()
    replayer = Replayer(add_to(total), recorder)
    for i in range(10):
        replayer((torch.full((2,), float(i)),), 2, ahead=100 - i)
    assert total.tolist() == [90, 90]
    assert recorder.events == {"warm": WARM_UP, "captured": 1, "replayed": 10 - WARM_UP}


def test_few_calls_are_not_recorded():
    total, recorder = torch.zeros(2), StandIn()
    replayer = Replayer(add_to(total), recorder)
    replayer((torch.ones(2),), 1, ahead=WARM_UP + WORTH_IT - 1)
    assert total.tolist() == [1, 1]
    assert not recorder.events


def test_recordings_are_one_for_each_mode_and_shape_up_to_a_number():
    total, recorder = torch.zeros(2), StandIn()
    replayer = Replayer(add_to(total), recorder)
    for mode in range(MOST + 4):
        for _ in range(5):
            replayer((torch.ones(2),), mode, ahead=100)
    assert recorder.events["captured"] == MOST
    assert total[0] == 5 * sum(range(MOST + 4))


def test_what_cannot_be_recorded_is_done_plainly(caplog):
    total, recorder = torch.zeros(2), StandIn()
    recorder.capture = mock.Mock(side_effect=RuntimeError("not permitted when capturing\nmore"))
    replayer = Replayer(add_to(total), recorder)
    for _ in range(10):
        replayer((torch.ones(2),), 1, ahead=100)
    assert total.tolist() == [10, 10]
    recorder.capture.assert_called_once()
    assert "no CUDA graphs for this network: not permitted when capturing" in caplog.text
