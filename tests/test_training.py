import copy
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fedge_sim import client, client_app, records
from fedge_sim.data import FederatedData, federated_data
from fedge_sim.data.base import (
    CPU,
    Dataset,
    Examples,
    Names,
    Resident,
    ResidentExamples,
    Standardisation,
    resident,
)
from fedge_sim.errors import ConfigError
from fedge_sim.models import MODELS, build_model, initialise
from fedge_sim.models.cnn1d import TimeConv
from fedge_sim.models.tracker import Tracker
from fedge_sim.randomness import stream, torch_generator
from fedge_sim.runtime.in_process import InProcessGrid
from fedge_sim.training import local
from fedge_sim.training.base import (
    ClientTask,
    TrainSettings,
    epochs,
    model_arrays,
    num_examples_seen,
    num_steps,
)
from fedge_sim.training.device import device, device_of
from fedge_sim.training.local import Evaluation, evaluate, pool

PLAIN = TrainSettings(
    lr=0.1, local_epochs=1, momentum=0, weight_decay=0, clip_norm=0, label_smoothing=0
)


def windows(n: int, classes: int = 6) -> Examples:
    rng = np.random.default_rng(1)
    y = rng.integers(classes, size=n)
    x = rng.normal(size=(n, 6, 20)) + y[:, None, None]
    return Examples(x.astype(np.float32), y, Standardisation.identity(6))


def fresh(name: str = "cnn1d", seed: int = 0) -> nn.Module:
    model = build_model(name, (6, 8, 8) if MODELS[name].num_axes == 3 else (6, 20), 6)
    initialise(model, torch_generator(seed, "test"))
    return model


def train(model, examples, rows, settings, order):
    return local.train(model, ClientTask({}, examples, rows, settings, order))


def vector(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_parameters_of_cnn1d():
    model = build_model("cnn1d", (6, 100), 6)
    assert sum(p.numel() for p in model.parameters()) == 23_174


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [
        ("cnn2d", (3, 32, 32), 2_156_490),
        ("resnet18", (3, 32, 32), 11_173_962),
        ("resnet18-tracked", (3, 32, 32), 11_164_362),
    ],
)
def test_networks_for_images(name, shape, parameters):
    model = build_model(name, shape, 10)
    initialise(model, torch_generator(0, "test"))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in model.modules())
    for size in (8, 32):
        images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
        logits = build_model(name, (3, size, size), 10)(images)
        assert logits.shape == (3, 10)
        assert logits.isfinite().all()
    if "resnet18" in name:
        assert model.blocks(torch.zeros(1, 64, 32, 32)).shape == (1, 512, 4, 4)


def test_the_small_network_for_images():
    """Two poolings, and batch statistics; the last width is that of the head, at any size."""
    for channels, size in ((1, 8), (3, 32), (3, 29)):
        model = build_model("cnn2d-small", (channels, size, size), 10)
        seen = []
        model.bn3.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))  # noqa: B023
        assert model(torch.zeros(2, channels, size, size)).shape == (2, 10)
        assert seen == [(2, 64, size // 4, size // 4)]
    assert sum(p.numel() for p in model.parameters()) == 24_346
    images = torch.rand(3, 3, 29, 29, generator=torch.Generator().manual_seed(0))
    x = images
    for number, pools in ((1, True), (2, True), (3, False)):
        x = getattr(model, f"bn{number}")(getattr(model, f"conv{number}")(x)).relu()
        x = functional.max_pool2d(x, 2) if pools else x
    torch.testing.assert_close(model(images), model.head(x.mean(dim=(2, 3))))


@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        ("cnn2d-small", (1, 7, 9), "needs images of 8 x 8, not 7 x 9"),
        (
            "cnn1d",
            (3, 32, 32),
            r"takes windows .*\(3, 32, 32\); allowed: cnn2d, cnn2d-small, mlp, resnet18, resnet18-tracked",
        ),
        ("resnet18", (6, 100), r"takes images .*allowed: cnn1d, mlp"),
        ("cnn2d", (64,), r"takes images .*allowed: mlp"),
        ("cnn2d", (1, 3, 9), "needs images of 4 x 4, not 3 x 9"),
    ],
)
def test_a_network_for_other_examples_is_refused(name, shape, problem):
    with pytest.raises(ConfigError, match=problem):
        build_model(name, shape, 6)


def test_trackers_watch_each_convolution_and_change_nothing():
    model = build_model("resnet18-tracked", (3, 8, 8), 10)
    initialise(model, torch_generator(0, "test"))
    seen = {}  # by the name of a convolution: what came out of it
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    logits = model.train()(x)
    behind = {"stem": "norm", "conv1": "norm1", "conv2": "norm2", "0": "1"}
    trackers = {n: t for n, t in model.named_modules() if isinstance(t, Tracker)}
    assert len(seen) == len(trackers) == 20
    for name, out in seen.items():
        *places, last = name.split(".")
        tracker = trackers[".".join([*places, behind[last]])]
        var, mean = torch.var_mean(out, (0, 2, 3), correction=0)
        torch.testing.assert_close(tracker.tracked_mean, 0.1 * mean)
        torch.testing.assert_close(tracker.tracked_variance, 0.9 + 0.1 * var)
        tracker.tracked_mean = tracker.tracked_mean + 5
    before = model_arrays(model)
    torch.testing.assert_close(model.eval()(x), logits)  # whatever they hold
    for name, array in model_arrays(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_time_convolution_is_conv1d():
    conv = TimeConv(6, 64, 5, padding=2)
    x = torch.randn(3, 6, 100, generator=torch.Generator().manual_seed(0))
    plain = functional.conv1d(x, conv.weight, conv.bias, padding=2)
    ours = conv(x.unsqueeze(2).contiguous(memory_format=torch.channels_last)).squeeze(2)
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("name", MODELS)
def test_initial_values_come_from_the_generator_alone(name):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = fresh(name)
    torch.manual_seed(2)
    assert torch.equal(vector(one), vector(fresh(name)))
    assert not torch.equal(vector(one), vector(fresh(name, seed=1)))
    torch.manual_seed(1)
    initialise(one, torch_generator(0, "test"))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_initial_values_follow_pytorchs_rule():
    model = fresh()
    ours = model.conv2.weight
    theirs = nn.Conv1d(64, 64, 5).weight
    assert ours.abs().max() <= (64 * 5) ** -0.5
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05)


def test_a_layer_without_a_rule_is_refused():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(TypeError, match="Odd: no rule to initialise"):
        initialise(Odd(), torch.Generator())


def test_one_step_by_hand():
    examples = windows(8)
    x, y = examples.batch(np.arange(8))
    model = fresh("mlp")
    start = vector(model)
    functional.cross_entropy(model(x), y).backward()
    gradient = nn.utils.parameters_to_vector([p.grad for p in model.parameters()])
    result = train(model, examples, np.arange(8), PLAIN, stream(0, "order"))
    torch.testing.assert_close(vector(model), start - 0.1 * gradient)
    assert result.steps == 1


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_proximal_term_by_hand(mu):
    """Two steps on one batch: the second gradient gains mu (w - w_start), the paper's sum.

    With mu = 0 the two steps are those of FedAvg.
    """
    examples = windows(8)
    x, y = examples.batch(np.arange(8))
    twice = TrainSettings(**{**vars(PLAIN), "local_epochs": 2, "prox_mu": mu})
    model, by_hand = fresh("mlp"), fresh("mlp")
    start = vector(by_hand)
    for _ in range(2):
        by_hand.zero_grad()
        w = nn.utils.parameters_to_vector(by_hand.parameters())
        loss = functional.cross_entropy(by_hand(x), y) + mu / 2 * (w - start).square().sum()
        loss.backward()
        with torch.no_grad():
            for p in by_hand.parameters():
                p -= 0.1 * p.grad
    train(model, examples, np.arange(8), twice, stream(0, "order"))
    torch.testing.assert_close(vector(model), vector(by_hand))


def test_clipping_bounds_the_step():
    examples = windows(8)
    for clip, bounded in ((0.01, True), (0.0, False)):
        model = fresh("mlp")
        start = vector(model)
        settings = TrainSettings(**{**vars(PLAIN), "clip_norm": clip})
        train(model, examples, np.arange(8), settings, stream(0, "order"))
        assert ((vector(model) - start).norm() <= 0.1 * 0.01 + 1e-6) == bounded


@pytest.mark.parametrize(("n", "steps"), [(64, 2), (65, 2), (66, 3), (2, 1)])
def test_short_batches(n, steps):
    """The last batch may be short, but not of one window."""
    examples = windows(n)
    result = train(fresh(), examples, np.arange(n), PLAIN, stream(0, "order"))
    assert result.steps == steps


@pytest.mark.parametrize(
    ("optimizer", "plainly"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.0001)),
        ("adam", lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.0001)),
    ],
)
def test_a_step_is_pytorchs_to_the_last_bit(optimizer, plainly):
    """The state begins at zero with every client."""
    examples, rows = windows(70), np.arange(70)
    model = fresh()
    settings = TrainSettings(lr=0.1, local_epochs=1, optimizer=optimizer)
    for number in range(2):
        plain = copy.deepcopy(model)
        train(model, examples, rows, settings, stream(number, "order"))
        steps = plainly(plain.parameters())
        for batch in np.split(stream(number, "order").permutation(rows), [32, 64]):
            x, y = examples.batch(batch)
            steps.zero_grad()
            functional.cross_entropy(plain.train()(x), y, label_smoothing=0.1).backward()
            nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            steps.step()
        assert torch.equal(vector(model), vector(plain))


@pytest.mark.parametrize("n", [64, 70, 76])
def test_accumulated_batches_are_one_large_batch(n):
    """76 = 32 + 32 + 12: the parts of the last step, 8 and 4 examples, weigh by their size."""
    examples, rows = windows(n), np.arange(n)
    parts = TrainSettings(lr=0.1, local_epochs=2, prox_mu=0.1, batch_size=8, accumulation=4)
    whole = TrainSettings(lr=0.1, local_epochs=2, prox_mu=0.1, batch_size=32)
    one, other = fresh("mlp"), fresh("mlp")
    in_parts = train(one, examples, rows, parts, stream(0, "order"))
    at_once = train(other, examples, rows, whole, stream(0, "order"))
    torch.testing.assert_close(vector(one), vector(other))
    assert in_parts.steps == at_once.steps == 2 * -(-n // 32)
    assert in_parts.loss == pytest.approx(at_once.loss, rel=1e-5)


@pytest.mark.parametrize(("n", "seen", "steps"), [(24, 24, 2), (25, 24, 2), (17, 16, 1), (1, 1, 1)])
def test_a_part_of_one_example_is_left_out(n, seen, steps):
    spy = Spy()
    settings = TrainSettings(**{**vars(PLAIN), "batch_size": 8, "accumulation": 2})
    result = train(spy, numbered(n), np.arange(n), settings, stream(0, "order"))
    assert (len(spy.seen), result.steps) == (seen, steps)


@pytest.mark.parametrize(
    ("n", "more", "steps"),
    [
        (33, {"local_epochs": 5}, 5),  # a last batch of one example is left out
        (34, {"local_epochs": 5}, 10),
        (17, {"batch_size": 8, "accumulation": 2, "local_epochs": 3}, 3),
        (33, {"local_steps": 7, "inner_steps": 3, "outer_lr": 0.1, "prox_mu": 1.0}, 21),
        (1, {"local_epochs": 2}, 2),
        (0, {"local_steps": 7}, 0),
    ],
)
def test_predicted_steps_by_hand(n, more, steps):
    settings = TrainSettings(**{**vars(PLAIN), **more})
    spy = Spy()
    result = train(spy, numbered(n), np.arange(n), settings, stream(0, "order"))
    assert num_steps(n, settings) == result.steps == steps
    assert num_examples_seen(n, settings) == len(spy.seen)


@given(
    st.integers(0, 90),
    st.builds(
        TrainSettings,
        lr=st.just(0.1),
        local_epochs=st.integers(1, 3),
        batch_size=st.integers(2, 40),
        accumulation=st.integers(1, 3),
        local_steps=st.integers(0, 9),
    ),
)
def test_predicted_steps_are_those_of_training(n, settings):
    task = ClientTask({}, windows(0), np.arange(n), settings, stream(0, "order"))
    steps = [step for epoch in epochs(task) for step in epoch]
    assert num_steps(n, settings) == len(steps)
    assert num_examples_seen(n, settings) == sum(len(batch) for step in steps for batch in step)
    assert all(len(batch) > 1 for step in steps for batch in step) or n == 1


class Spy(nn.Module):
    """Keeps the first value of every example that it sees."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 6)
        self.seen = []

    def forward(self, x):
        self.seen += x[:, 0, 0].tolist()
        return self.head(x[:, 0, :1])


def numbered(n: int) -> Examples:
    x = np.arange(n, dtype=np.float32).reshape(n, 1, 1)
    return Examples(x, np.zeros(n, np.int64), Standardisation.identity(1))


def test_every_window_is_seen_once_an_epoch():
    rows = np.arange(3, 37)
    spy = Spy()
    settings = TrainSettings(**{**vars(PLAIN), "local_epochs": 2})
    train(spy, numbered(40), rows, settings, stream(0, "order"))
    first, second = spy.seen[:34], spy.seen[34:]
    assert sorted(first) == sorted(second) == rows.tolist()
    assert first != second


def test_it_learns():
    examples = windows(300)
    model = fresh()
    before = evaluate(model, examples, np.arange(300))
    settings = TrainSettings(lr=0.05, local_epochs=5)
    result = train(model, examples, np.arange(300), settings, stream(0, "order"))
    after = evaluate(model, examples, np.arange(300))
    assert after.accuracy > 0.9 > before.accuracy
    assert result.loss < before.loss


def test_evaluation_by_hand():
    examples = windows(10)
    model = fresh("mlp").eval()
    rows = np.array([1, 3, 4, 8])
    x, y = examples.batch(rows)
    logits = model(x)
    expected = functional.cross_entropy(logits, y).item()
    result = evaluate(model, examples, rows, batch_size=3)
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert result.accuracy == (logits.argmax(1) == y).float().mean().item()


def test_pooling_weighs_by_windows():
    pooled = pool([Evaluation(1.0, 0.5, 10), Evaluation(2.0, 1.0, 30)])
    assert pooled == Evaluation(1.75, 0.875, 40)
    assert np.isnan(pool([]).accuracy)


def test_streams_differ_by_every_part_of_their_name():
    names = [(1, "a", 1), (2, "a", 1), (1, "b", 1), (1, "a", 2), (1, "a", 1, 0)]
    draws = {tuple(stream(*name).integers(2**62, size=2)) for name in names}
    assert len(draws) == len(names)


# ------------------------------------------------------------------ on a device

META = torch.device("meta")  # has shapes, but no values


def dataset(n: int = 20, content: str = "a") -> Dataset:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(n, 6, 5)).astype(np.float32) * 7
    x.setflags(write=False)
    none = np.full(n, -1, np.int32)
    y = rng.integers(6, size=n)
    return Dataset(x, y, none, none, none, none, none, Names(tuple("abcdef")), content)


def test_the_device_is_the_gpu_that_the_process_sees():
    with mock.patch("torch.cuda.is_available", return_value=False):
        assert device() == CPU
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.current_device", return_value=1),
    ):
        assert device() == torch.device("cuda:1")


def test_batches_come_to_the_models_device():
    asked = []

    class Asked(Examples):
        def batch(self, rows, device=None):
            asked.append(device)
            return super().batch(rows, device)

    examples = Asked(**vars(windows(8)))
    model = fresh("mlp")
    train(model, examples, np.arange(8), PLAIN, stream(0, "order"))
    evaluate(model, examples, np.arange(8))
    assert asked == [CPU, CPU]
    assert device_of(model.to(META)) == META
    x, y = examples.batch(np.arange(3), META)
    assert (x.device, x.shape, y.device, y.shape) == (META, (3, 6, 20), META, (3,))


def test_batches_gathered_on_the_device_are_the_same():
    data, rows = dataset(), np.array([7, 3, 19, 7])
    scale = Standardisation.of(data.x, np.arange(10))
    with mock.patch("fedge_sim.data.base.CHUNK_BYTES", 3 * data.x[0].nbytes):
        there = Resident.of(data, CPU)
    plain = Examples(data.x, data.y, scale)
    held = ResidentExamples(data.x, data.y, scale, resident=there)
    for ours, theirs in zip(held.batch(rows), plain.batch(rows), strict=True):
        assert torch.equal(ours, theirs)
    assert np.array_equal(there.x, data.x)  # as raw as before
    assert held.batch(rows, META)[0].device == META


def test_one_dataset_at_a_time_is_kept_on_a_device():
    first = resident(dataset(), META)
    assert resident(dataset(), META) is first
    assert resident(dataset(content="b"), META) is not first
    assert resident(dataset(), META) is not first


def test_examples_of_a_client_on_a_device():
    data = FederatedData(dataset(), (), [Standardisation.identity(6)])
    assert type(data.examples(0, CPU, caching=True)) is Examples
    held = data.examples(0, META, caching=True)
    assert held.resident.x.device == META
    x, y = held.batch(np.array([1, 2]), META)
    assert (x.device, x.shape, y.device) == (META, (2, 6, 5), META)
    assert type(data.examples(0, META)) is Examples
    assert data.examples(0, META, pipelining=True).pinned


@pytest.mark.parametrize("pinned", [True, False])
def test_pinned_batches_do_not_wait(pinned):
    examples = Examples(**{**vars(windows(4)), "pinned": pinned})
    moves = []

    def move(values, device, **how):
        moves.append((device.type, how))
        return values

    with (
        mock.patch("torch.Tensor.pin_memory", lambda values: values),
        mock.patch("torch.Tensor.to", move),
    ):
        examples.batch(np.arange(2), torch.device("cuda:0"))
    assert moves == [("cuda", {"non_blocking": True} if pinned else {})] * 2
    assert examples.batch(np.arange(2))[0].device == CPU  # which needs no pinning


def trained(settings) -> list[dict[str, bytes]]:
    """Train clients 0, 1 and, a round later, 2 one after the other in one thread."""
    data = federated_data(settings)
    model = build_model("cnn1d", data.example_shape, len(data.classes))
    initialise(model, torch_generator(0, "test"))
    start = records.to_record(model_arrays(model))
    with InProcessGrid(client_app.app, 1) as grid:
        messages = []
        for client in range(3):
            config = records.train_config(settings, lr=0.1, prox_mu=0.0)
            config.update({records.ROUND: 1 + client // 2, records.CLIENT_ID: client})
            messages.append(records.instruction(2, "train", config, start))
        replies = grid.send_and_receive(messages)
    arrays = [records.to_arrays(records.arrays_of(reply)) for reply in replies]
    return [{name: array.tobytes() for name, array in own.items()} for own in arrays]


def test_a_network_kept_warm_changes_nothing(small):
    results = []
    # Without a GPU, "profile" keeps them.
    for keep, built in (("false", 2), ("true", 1), ('"profile"', 1)):
        settings = small(f"runtime.keep_warm={keep}")
        with mock.patch.object(client, "build_model", wraps=build_model) as build:
            results.append(trained(settings))
        assert build.call_count == built
    assert results[0] == results[1] == results[2]


def test_the_profiles_batches_reach_the_training(small):
    batches = ("hierarchy.batch_size=profile", "hierarchy.accumulation=profile")
    settings = small(*batches, "runtime.gpu_profile=aggressive")
    with mock.patch.object(local, "train", wraps=local.train) as spy:
        trained(settings)
    used = [call.args[1].settings for call in spy.call_args_list]
    assert [(u.batch_size, u.accumulation) for u in used] == [(128, 2)] * 3
