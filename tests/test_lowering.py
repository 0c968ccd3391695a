"""Steps as written for the compiler compute what PyTorch's own operators do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from fedge_sim.training.lowering import DECOMPOSITIONS, mask_by_input

aten = torch.ops.aten
SHAPES = st.sampled_from([(2, 1), (5, 3), (4, 3, 7), (3, 2, 4, 5), (1, 3, 2, 2)])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 + 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def traced(function, *arguments):
    return make_fx(function, DECOMPOSITIONS, tracing_mode="fake")(*arguments)


def targets(graph) -> set:
    return {node.target for node in graph.graph.nodes if node.op == "call_function"}


@settings(deadline=None)  # the first call loads much
@given(SHAPES, st.booleans(), st.booleans(), st.integers(0, 99))
def test_batch_norm_is_pytorchs(shape, affine, tracks, seed):
    channels = shape[1]
    x, g = draw(*shape, seed=seed), draw(*shape, seed=seed + 1)
    parameters = [draw(channels), draw(channels, seed=1)] if affine else [None, None]

    def run(function):
        running = [torch.zeros(channels).double(), torch.ones(channels).double()]
        running = running if tracks else [None, None]
        out, mean, inverse = function(x, *parameters, *running, True, 0.1, 1e-5)
        return [out, mean, inverse, *running]

    ours = run(DECOMPOSITIONS[aten.native_batch_norm.default])
    theirs = run(aten.native_batch_norm.default)
    torch.testing.assert_close(ours, theirs)

    saved = (parameters[0], None, None, *theirs[1:3])
    asked = (True, 1e-5, [True, affine, affine])
    backward = DECOMPOSITIONS[aten.native_batch_norm_backward.default](g, x, *saved, *asked)
    expected = aten.native_batch_norm_backward(g, x, *saved, *asked)
    torch.testing.assert_close(backward[0], expected[0])
    if affine:
        torch.testing.assert_close(list(backward[1:]), list(expected[1:]))


def test_batch_norm_of_a_frozen_network_is_left_alone():
    arguments = [draw(4, 3), draw(3), draw(3), draw(3), draw(3).abs()]
    frozen = (False, 0.1, 1e-5)
    assert DECOMPOSITIONS[aten.native_batch_norm.default](*arguments, *frozen) is NotImplemented
    graph = traced(lambda *a: aten.native_batch_norm(*a, *frozen)[0], *arguments)
    assert aten.native_batch_norm.default in targets(graph)


@pytest.mark.parametrize("bias", [True, False])
def test_bias_gradients_are_sums(bias):
    conv = nn.Conv2d(2, 3, 3, padding=1, groups=1, bias=bias).double()
    values = [p.detach() for p in conv.parameters()]

    def gradients(x, *parameters):
        leaves = [p.detach().requires_grad_() for p in (x, *parameters)]
        out = functional.conv2d(*leaves, padding=1)
        return torch.autograd.grad(out.square().sum(), leaves)

    x = draw(4, 2, 5, 6)
    graph = traced(gradients, x, *values)
    torch.testing.assert_close(graph(x, *values), gradients(x, *values))
    [node] = graph.graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
    assert node.args[-1] == [True, True, False]


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # PyTorch's own
@pytest.mark.parametrize("inplace", [True, False])
def test_relus_gradient_asks_for_what_went_in(inplace):
    def gradient(x):
        leaf = x.detach().requires_grad_()
        [found] = torch.autograd.grad(functional.relu(leaf * 2, inplace).square().sum(), leaf)
        return found

    x = draw(7)
    x[0] = 0.0
    graph = torch.export.export(traced(gradient, x), (x,)).run_decompositions({}).graph_module
    mask_by_input(graph)
    [node] = graph.graph.find_nodes(op="call_function", target=aten.threshold_backward.default)
    assert node.args[1].target is aten.mul.Tensor
    torch.testing.assert_close(graph(x)[0], gradient(x))


def test_a_threshold_of_something_else_stays():
    module = traced(lambda g, y: aten.threshold_backward(g, aten.sigmoid(y), 0.5), draw(3), draw(3))
    mask_by_input(module)
    [node] = module.graph.find_nodes(op="call_function", target=aten.threshold_backward.default)
    assert node.args[1].target is aten.sigmoid.default
