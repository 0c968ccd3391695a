import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedge_sim.models import MODELS, build_model, initialise
from fedge_sim.models.cnn1d import TimeConv
from fedge_sim.randomness import stream, torch_generator
from fedge_sim.training.local import Evaluation, TrainSettings, evaluate, pool, train

PLAIN = TrainSettings(
    lr=0.1, local_epochs=1, momentum=0, weight_decay=0, clip_norm=0, label_smoothing=0
)


def windows(n: int, classes: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(1)
    y = rng.integers(classes, size=n)
    x = rng.normal(size=(n, 6, 20)) + y[:, None, None]
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y)


def fresh(name: str = "cnn1d", seed: int = 0) -> nn.Module:
    model = build_model(name, (6, 20), 6)
    initialise(model, torch_generator(seed, "test"))
    return model


def vector(model: nn.Module) -> torch.Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_parameters_of_cnn1d():
    model = build_model("cnn1d", (6, 100), 6)
    assert sum(p.numel() for p in model.parameters()) == 23_174


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
    x, y = windows(8)
    model = fresh("mlp")
    start = vector(model)
    functional.cross_entropy(model(x), y).backward()
    gradient = nn.utils.parameters_to_vector([p.grad for p in model.parameters()])
    result = train(model, x, y, np.arange(8), PLAIN, stream(0, "order"))
    torch.testing.assert_close(vector(model), start - 0.1 * gradient)
    assert result.steps == 1


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_proximal_term_by_hand(mu):
    """Two steps on one batch: the second gradient gains mu (w - w_start), the paper's sum.

    With mu = 0 the two steps are those of FedAvg.
    """
    x, y = windows(8)
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
    train(model, x, y, np.arange(8), twice, stream(0, "order"))
    torch.testing.assert_close(vector(model), vector(by_hand))


def test_clipping_bounds_the_step():
    x, y = windows(8)
    for clip, bounded in ((0.01, True), (0.0, False)):
        model = fresh("mlp")
        start = vector(model)
        settings = TrainSettings(**{**vars(PLAIN), "clip_norm": clip})
        train(model, x, y, np.arange(8), settings, stream(0, "order"))
        assert ((vector(model) - start).norm() <= 0.1 * 0.01 + 1e-6) == bounded


@pytest.mark.parametrize(("n", "steps"), [(64, 2), (65, 2), (66, 3), (2, 1)])
def test_short_batches(n, steps):
    """The last batch may be short, but not of one window."""
    x, y = windows(n)
    result = train(fresh(), x, y, np.arange(n), PLAIN, stream(0, "order"))
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

    x = torch.arange(40.0).reshape(40, 1, 1)
    rows = np.arange(3, 37)
    spy = Spy()
    settings = TrainSettings(**{**vars(PLAIN), "local_epochs": 2})
    train(spy, x, torch.zeros(40, dtype=torch.long), rows, settings, stream(0, "order"))
    first, second = spy.seen[:34], spy.seen[34:]
    assert sorted(first) == sorted(second) == rows.tolist()
    assert first != second


def test_it_learns():
    x, y = windows(300)
    model = fresh()
    before = evaluate(model, x, y, np.arange(300))
    settings = TrainSettings(lr=0.05, local_epochs=5)
    result = train(model, x, y, np.arange(300), settings, stream(0, "order"))
    after = evaluate(model, x, y, np.arange(300))
    assert after.accuracy > 0.9 > before.accuracy
    assert result.loss < before.loss


def test_evaluation_by_hand():
    x, y = windows(10)
    model = fresh("mlp").eval()
    rows = np.array([1, 3, 4, 8])
    logits = model(x[rows])
    expected = functional.cross_entropy(logits, y[rows]).item()
    result = evaluate(model, x, y, rows, batch_size=3)
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert result.accuracy == (logits.argmax(1) == y[rows]).float().mean().item()


def test_pooling_weighs_by_windows():
    pooled = pool([Evaluation(1.0, 0.5, 10), Evaluation(2.0, 1.0, 30)])
    assert pooled == Evaluation(1.75, 0.875, 40)
    assert np.isnan(pool([]).accuracy)


def test_streams_differ_by_every_part_of_their_name():
    names = [(1, "a", 1), (2, "a", 1), (1, "b", 1), (1, "a", 2), (1, "a", 1, 0)]
    draws = {tuple(stream(*name).integers(2**62, size=2)) for name in names}
    assert len(draws) == len(names)
