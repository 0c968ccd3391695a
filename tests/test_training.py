import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedge_sim.data.base import Examples, Standardisation
from fedge_sim.errors import ConfigError
from fedge_sim.models import MODELS, build_model, initialise
from fedge_sim.models.cnn1d import TimeConv
from fedge_sim.randomness import stream, torch_generator
from fedge_sim.training.local import Evaluation, TrainSettings, evaluate, pool, train

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


def vector(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_parameters_of_cnn1d():
    model = build_model("cnn1d", (6, 100), 6)
    assert sum(p.numel() for p in model.parameters()) == 23_174


@pytest.mark.parametrize(
    ("name", "shape", "parameters"),
    [("cnn2d", (3, 32, 32), 2_156_490), ("resnet18", (3, 32, 32), 11_173_962)],
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
    if name == "resnet18":
        assert model.blocks(torch.zeros(1, 64, 32, 32)).shape == (1, 512, 4, 4)


@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        ("cnn1d", (3, 32, 32), r"takes windows .*\(3, 32, 32\); allowed: cnn2d, mlp, resnet18"),
        ("resnet18", (6, 100), r"takes images .*allowed: cnn1d, mlp"),
        ("cnn2d", (64,), r"takes images .*allowed: mlp"),
        ("cnn2d", (1, 3, 9), "needs images of 4 x 4, not 3 x 9"),
    ],
)
def test_a_network_for_other_examples_is_refused(name, shape, problem):
    with pytest.raises(ConfigError, match=problem):
        build_model(name, shape, 6)


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


def test_every_window_is_seen_once_an_epoch():
    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(1, 6)
            self.seen = []

        def forward(self, x):
            self.seen += x[:, 0, 0].tolist()
            return self.head(x[:, 0, :1])

    x = np.arange(40, dtype=np.float32).reshape(40, 1, 1)
    examples = Examples(x, np.zeros(40, np.int64), Standardisation.identity(1))
    rows = np.arange(3, 37)
    spy = Spy()
    settings = TrainSettings(**{**vars(PLAIN), "local_epochs": 2})
    train(spy, examples, rows, settings, stream(0, "order"))
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
