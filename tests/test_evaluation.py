"""Clients evaluated together come out as each does alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge_sim.data.base import Examples, Standardisation
from fedge_sim.models import build_model, initialise
from fedge_sim.randomness import torch_generator
from fedge_sim.training.evaluation import evaluate_together
from fedge_sim.training.local import Evaluation, evaluate


def examples(shape=(6, 20), mean=0.0) -> Examples:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, *shape)).astype(np.float32)
    channels = shape[0]
    scale = Standardisation(np.full(channels, mean, np.float32), np.ones(channels, np.float32))
    return Examples(x, rng.integers(4, size=50), scale)


def network(name="cnn1d", shape=(6, 20)):
    model = build_model(name, shape, 4)
    initialise(model, torch_generator(0, "test"))
    return model


def close(ours: Evaluation, theirs: Evaluation) -> bool:
    assert ours.num_examples == theirs.num_examples
    return ours.loss == pytest.approx(theirs.loss, rel=1e-5) and ours.accuracy == theirs.accuracy


@settings(max_examples=40)
@given(sizes=st.lists(st.integers(0, 20), max_size=6), batch=st.integers(1, 30))
def test_together_is_as_alone(sizes, batch):
    rng, model = np.random.default_rng(1), network("mlp")
    parts = [(examples(mean=i / 2), rng.integers(50, size=n)) for i, n in enumerate(sizes)]
    together = evaluate_together(model, parts, batch)
    assert len(together) == len(parts)
    assert all(
        close(ours, evaluate(model, *part)) for ours, part in zip(together, parts, strict=True)
    )


@pytest.mark.parametrize(("name", "shape"), [("cnn1d", (6, 20)), ("cnn2d", (3, 8, 8))])
def test_every_kind_of_network(name, shape):
    model, own = network(name, shape), examples(shape)
    parts = [(own, np.arange(7)), (own, np.arange(5, 40))]
    for ours, part in zip(evaluate_together(model, parts, 16), parts, strict=True):
        assert close(ours, evaluate(model, *part))


def test_batches_are_full_across_clients():
    seen = []

    class Counts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(120, 4)

        def forward(self, x):
            seen.append(len(x))
            return self.head(x.flatten(1))

    evaluate_together(Counts(), [(examples(), np.arange(n)) for n in (5, 0, 20, 3)], 10)
    assert seen == [10, 10, 8]


def test_in_bfloat16():
    parts = [(examples(), np.arange(40))]
    [ours] = evaluate_together(network(), parts, 16, torch.bfloat16)
    assert ours.loss == pytest.approx(evaluate(network(), *parts[0]).loss, rel=0.02)
