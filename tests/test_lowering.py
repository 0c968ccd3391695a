"""Steps as written for the compiler compute what PyTorch's own operators do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
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


def test_batch_norm_in_training_is_replaced():
    def gradients(x, weight, bias):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        out = functional.batch_norm(leaves[0], None, None, *leaves[1:], training=True)
        return torch.autograd.grad(out.pow(3).sum(), leaves)

    arguments = [draw(4, 3, 5), draw(3), draw(3, seed=1)]
    graph = traced(gradients, *arguments)
    assert not {t for t in targets(graph) if "batch_norm" in str(t)}
    torch.testing.assert_close(graph(*arguments), gradients(*arguments))


@pytest.mark.parametrize(
    ("training", "dtype"), [(False, torch.float64), (True, torch.float16), (True, torch.bfloat16)]
)
def test_batch_norm_frozen_or_of_16_bits_is_left_alone(training, dtype):
    x, *channels = (t.to(dtype) for t in (draw(4, 3), draw(3), draw(3), draw(3), draw(3).abs()))
    frozen = (training, 0.1, 1e-5)
    graph = traced(lambda *a: aten.native_batch_norm(*a, *frozen)[0], x, *channels)
    assert aten.native_batch_norm.default in targets(graph)
    saved = (channels[0], *channels[2:], draw(3), draw(3), training, 1e-5, [True] * 3)
    backward = DECOMPOSITIONS[aten.native_batch_norm_backward.default]
    assert backward(x, x, *saved) is NotImplemented


CONVOLUTIONS = {
    "1d": (nn.Conv1d(2, 3, 3), (4, 2, 6)),
    "2d": (nn.Conv2d(2, 3, 3, padding=1), (4, 2, 5, 6)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2), (4, 4, 5, 6)),
    "3d": (nn.Conv3d(2, 3, 2), (2, 2, 4, 3, 3)),
    "transposed": (nn.ConvTranspose2d(2, 3, 3), (4, 2, 5, 6)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_bias_gradients_are_sums(kind):
    conv, shape = CONVOLUTIONS[kind]
    conv = conv.double()
    names = [name for name, _ in conv.named_parameters()]

    def gradients(x, *parameters):
        leaves = [p.detach().requires_grad_() for p in (x, *parameters)]
        out = functional_call(conv, dict(zip(names, leaves[1:], strict=True)), leaves[0])
        return torch.autograd.grad(out.square().sum(), leaves)

    arguments = [draw(*shape), *[p.detach() for p in conv.parameters()]]
    graph = traced(gradients, *arguments)
    torch.testing.assert_close(graph(*arguments), gradients(*arguments))
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


@pytest.mark.parametrize(("operator", "threshold"), [(aten.sigmoid, 0), (aten.relu, -1)])
def test_another_threshold_stays(operator, threshold):
    arguments = draw(3), draw(3)
    module = traced(lambda g, y: aten.threshold_backward(g, operator(y), threshold), *arguments)
    mask_by_input(module)
    [node] = module.graph.find_nodes(op="call_function", target=aten.threshold_backward.default)
    assert node.args[1].target is operator.default
