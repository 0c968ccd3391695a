"""The benchmark's parts: the count of FLOPs, the bare loop, what is said of the measurements."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from itertools import chain
from math import prod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedge_sim.data.base import Examples, Standardisation
from fedge_sim.data.split import random_split
from fedge_sim.models import build_model, initialise
from fedge_sim.training.base import ClientTask, TrainSettings
from fedge_sim.training.local import train
from tests.conftest import opened

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.append(str(SCRIPTS))
flops, workloads, bare_loop, measuring, bench_training, bench_cohort, cohort_point = map(
    import_module,
    (
        *("flops", "workloads", "bare_loop", "measuring", "bench_training"),
        *("bench_cohort", "cohort_point"),
    ),
)
SMALL = workloads.Workload("small", ((70, 41), (40,)), workloads.TRAINING | {"local_epochs": 1})
IMAGES = {"example_shape": (3, 32, 32), "num_classes": 10, "model": "cnn2d"}


# ------------------------------------------------------------------ FLOPs


def test_flops_of_the_reference_network():
    # Conv 6->64 and 64->64, 5 wide, over 100 samples; Linear 64->6.
    conv1, conv2, head = 6 * 5 * 64 * 100, 64 * 5 * 64 * 100, 64 * 6
    work = flops.count(build_model("cnn1d", (6, 100), 6), (6, 100))
    assert (work.forward, work.first) == (conv1 + conv2 + head, conv1)
    assert work.forward == 2_240_384
    assert work.training_flops == 2 * (2 * conv1 + 3 * (conv2 + head))
    assert 32 * work.training_flops == pytest.approx(0.418e9, rel=1e-3)


def test_flops_of_a_perceptron():
    layers = (600 * 128, 128 * 64, 64 * 6)
    work = flops.count(build_model("mlp", (6, 100), 6), (6, 100))
    assert (work.forward, work.first) == (sum(layers), layers[0])


def test_flops_of_the_image_network():
    # Both convolutions are 5 x 5; each is followed by a pooling that halves the image.
    convs = (3 * 25 * 32 * 32**2, 32 * 25 * 64 * 16**2)
    linear = (64 * 8 * 8 * 512, 512 * 10)
    network = build_model("cnn2d", (3, 32, 32), 10)
    work = flops.count(network, (3, 32, 32))
    assert (work.forward, work.first) == (sum(convs + linear), convs[0])
    assert network.training  # as before
    assert not any(layer._forward_hooks for layer in network.modules())


def test_a_network_without_layers_to_count_is_refused():
    with pytest.raises(ValueError, match="no convolution or linear layer"):
        flops.count(torch.nn.ReLU(), (3,))


# ------------------------------------------------------------------ workloads


def test_the_workloads_are_those_of_the_targets():
    w1 = workloads.W1
    assert len(w1.batches) == 1470
    assert sum(w1.batches) == 5 * 3 * (2204 + 455 + 418)
    assert len(workloads.W1_FULL.client_sizes) == 9
    cifar = workloads.CIFAR
    assert cifar.batches[:25] == [*[32] * 10, 30, *[32] * 10, 30, *[32] * 3]
    assert len(cifar.batches) == 100 * 25
    held_out = random_split(np.arange(438), seed=0, client=0)
    assert len(held_out.train) == 350


def test_a_workload_survives_the_way_to_another_process():
    again = workloads.Workload.from_json(SMALL.to_json())
    assert again.client_sizes == SMALL.client_sizes
    assert (again.batches, str(again)) == (SMALL.batches, str(SMALL))


def test_all_sides_get_the_same_examples(tmp_path, monkeypatch):
    monkeypatch.setattr(workloads, "CHUNK_BYTES", 4 * 600 * 64)  # of three parts
    SMALL.write(tmp_path / "data")
    x, y, client = (np.load(tmp_path / f"data/{name}.npy") for name in ("x", "y", "client"))
    assert x.shape == (151, 6, 100)
    assert np.bincount(client).tolist() == [70, 41, 40]
    ours = opened("arrays", tmp_path / "data" / workloads.OURS)
    assert np.array_equal(ours.x, x)
    assert np.array_equal(ours.y, y)
    assert np.array_equal(ours.user, client)
    whole = np.random.default_rng(0).standard_normal((151, 6, 100), np.float32)
    assert np.array_equal(x, whole)


# ------------------------------------------------------------------ the bare loop


def test_clients_are_shared_out_longest_first():
    sizes = workloads.W1.client_sizes
    shares = bare_loop.share_out(sizes, 2)
    assert sorted(chain.from_iterable(shares)) == list(range(9))
    assert [sum(sizes[c] for c in share) for share in shares] == [5510, 6031]
    assert bare_loop.share_out([3, 9], 4) == [[1], [0]]


@pytest.mark.parametrize(
    ("workload", "local_steps"),
    [(SMALL, 0), (replace(SMALL, **IMAGES), 4)],
    ids=["epochs of cnn1d", "steps of cnn2d"],
)
def test_the_bare_loop_learns_what_the_reference_learns(workload, local_steps):
    shape, model = tuple(workload.example_shape), workload.model
    workload = replace(workload, training=workload.training | {"local_steps": local_steps})
    rng, n = np.random.default_rng(1), 70
    x = rng.standard_normal((n, *shape), np.float32)
    y = rng.integers(workload.num_classes, size=n)
    config = workload.yardstick_config(Path(), rounds=1)

    ours = build_model(model, shape, workload.num_classes)
    initialise(ours, torch.Generator().manual_seed(3))
    bare = bare_loop.NETWORKS[model](workload.num_classes)
    values = ours.state_dict().values()
    bare.load_state_dict({k: v.clone() for k, v in zip(bare.state_dict(), values, strict=True)})

    bare_loop.train(
        bare, torch.from_numpy(x), torch.from_numpy(y), config, np.random.default_rng(5)
    )
    settings = {
        k: v for k, v in workload.training.items() if k not in ("lr_init", "eval_batch_size")
    }
    task = ClientTask(
        start={},
        examples=Examples(x, y, Standardisation.identity(shape[0])),
        rows=np.arange(n),
        settings=TrainSettings(lr=workload.training["lr_init"], **settings),
        order=np.random.default_rng(5),
    )
    assert train(ours, task).steps == (local_steps or 3)
    for mine, theirs in zip(ours.state_dict().values(), bare.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_step_of_the_bare_loop_is_sgd_with_a_clipped_gradient():
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 3)
    weight, bias = net.weight.detach().clone(), net.bias.detach().clone()
    x, y = torch.randn(8, 4) * 10, torch.randint(3, (8,))
    config = SMALL.yardstick_config(Path(), rounds=1)
    bare_loop.train(net, x, y, config, np.random.default_rng(0))

    weight.requires_grad_(), bias.requires_grad_()
    functional.cross_entropy(x @ weight.T + bias, y, label_smoothing=0.1).backward()
    norm = torch.cat([weight.grad.flatten(), bias.grad]).norm()
    assert norm > 1
    for start, trained in ((weight, net.weight), (bias, net.bias)):
        expected = start - 0.05 * (start.grad / norm + 1e-4 * start)
        torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-6)


def test_the_bare_loop_averages_by_examples():
    parts = [({"w": np.array([2.0, 4.0])}, 1), ({"w": np.array([6.0, 0.0])}, 3)]
    assert bare_loop.average(parts)["w"].tolist() == [2.0, 1.0]
    net = torch.nn.Linear(2, 6)
    start = bare_loop.weights_of(net)
    config = SMALL.yardstick_config(Path(), 1) | {"lr-init": 0.0}
    clients = [(torch.randn(n, 2), torch.zeros(n, dtype=torch.int64)) for n in (5, 7)]
    sums, examples = bare_loop.train_all(net, start, clients, config, np.random.default_rng(0))
    assert examples == 12
    np.testing.assert_allclose(sums["weight"], 12 * start["weight"], rtol=1e-6)


def test_the_bare_loop_runs_in_processes_of_its_own(tmp_path):
    SMALL.write(tmp_path / "data")
    config = SMALL.yardstick_config(tmp_path / "data", rounds=2) | {"processes": 2}
    command = [sys.executable, str(SCRIPTS / "bare_loop.py"), json.dumps(config), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accuracy") == 2
    assert len((tmp_path / "stamps.jsonl").read_text().splitlines()) == 3


# ------------------------------------------------------------------ what is said


def side(*seconds, peak=100):
    stamps = np.cumsum([10.0, *seconds]).tolist()
    return measuring.Measurement(8.0, 9.0, stamps, [(10.0, peak * measuring.MIB)], 0.1)


def test_a_single_round_is_the_measurement():
    assert side(9, 2, 4).median == 3
    assert side(70).median == 70
    assert bench_training.line("ours", side(70)).split()[4] == "-"  # no warm-up


def test_the_ratios_compare_us_with_both_yardsticks():
    sides = {
        "ours, in one process": side(9, 3, peak=50),
        "ours, Ray": side(9, 2),
        "plain Flower": side(9, 4),
        "bare PyTorch loop": side(9, 2, peak=25),
    }
    lines = [" ".join(line.split()) for line in bench_training.ratios(sides)]
    assert lines == [
        "ours, in one process / plain Flower seconds 0.75 memory 0.50",
        "ours, Ray / plain Flower seconds 0.50 memory 1.00",
        "ours, in one process / bare PyTorch loop seconds 1.50 memory 2.00",
        "ours, Ray / bare PyTorch loop seconds 1.00 memory 4.00",
        "bare PyTorch loop / plain Flower seconds 0.50 memory 0.25",
    ]
    assert bench_training.faster(sides) == "ours, Ray"


@pytest.mark.parametrize(
    ("value", "limit", "levels", "said"),
    [
        (0.38, "at most", (0.5, 0.4), "at most 0.5: met; stretch: at most 0.4: met"),
        (0.45, "at most", (0.5, 0.4), "at most 0.5: met; stretch: at most 0.4: MISSED"),
        (0.51, "at most", (0.5, 0.4), "at most 0.5: MISSED; stretch: at most 0.4: MISSED"),
        (55.0, "at least", (50, 60), "at least 50: met; stretch: at least 60: MISSED"),
        (49.0, "at least", (50, 60), "at least 50: MISSED; stretch: at least 60: MISSED"),
    ],
)
def test_a_target_is_met_or_missed(value, limit, levels, said):
    line = bench_training.target("ours / theirs", value, limit, levels)
    assert line.endswith(f"{value:.2f}   target: {said}")


def test_the_useful_share_is_of_the_best_sgemm(capsys):
    rates = [flops.Sgemm(each, 2, "core", "so") for each in (30e9, 60e9, 45e9)]
    shares = bench_training.print_useful_work(workloads.W1, {"ours": side(9, 10)}, rates)
    # 46,155 examples of 13.058 MFLOP in 10 s, of 120 GFLOP/s.
    assert shares["ours"] == pytest.approx(100 * 46_155 * 13_058_304 / 10 / 120e9)
    assert "30, 60, 45" in capsys.readouterr().out


def test_what_a_hundred_full_rounds_would_take(monkeypatch, capsys):
    sides = {"ours, in one process": side(120), "ours, Ray": side(9, 90, 90)}
    rates = [flops.Sgemm(60e9, 2, "core", "so")]
    monkeypatch.setattr(bench_training, "measure_sides", lambda *_, **__: (sides, rates))
    bench_training.bench_full(measuring.Options(1, Path(), (), Path()))
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "ours, in one process, 100 rounds as long 3 h 20 min" in said
    assert "ours, Ray, 100 rounds as long 2 h 30 min" in said


# ------------------------------------------------------------------ cohorts


def point(path, size, rate, growth=2**20, free=2**30):
    return cohort_point.Point(path, size, size / rate, 5, 1.0, growth, free)


def test_from_which_size_a_cohort_wins():
    alone = [point("reference", 1, 10.0), point("single", 1, 20.0)]

    def verdict(*rates):
        cohorts = [point("cohort", 2**i, rate) for i, rate in enumerate(rates)]
        return bench_cohort.verdict("mlp", [*alone, *cohorts])

    assert verdict(5, 19, 20).endswith("never beats one client at a time (single, 20.0 clients a "
                                       "second) on this hardware, up to 4 together")  # fmt: skip
    assert "from 4 together on; most with 8: 60.0 clients a second, 3.00 times" in verdict(
        5, 19, 30, 60
    )
    assert "from 2 together to 4; most with 4" in verdict(5, 25, 30, 15)
    assert bench_cohort.verdict("mlp", alone) == "mlp: nothing to compare"


def test_a_cohort_that_is_too_large_is_not_tried():
    fits = point("cohort", 4, 10.0, growth=2**20, free=2**30)
    assert bench_cohort.too_large(fits, 8) == ""
    large = replace(fits, growth=2**28)  # a quarter of what is free, already
    assert "512 MiB would be needed, more than 25% of what is free (256 MiB)" in (
        bench_cohort.too_large(large, 8)
    )
    slow = replace(fits, seconds=16.0)
    assert "two calls would take 64 s" in bench_cohort.too_large(slow, 8)


def test_a_point_that_fails_says_why(monkeypatch):
    failed = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nKeyError: 'x'\n")
    monkeypatch.setattr(bench_cohort.subprocess, "run", lambda *_, **__: failed)
    question = cohort_point.Question("mlp", "cohort", 2, "nowhere")
    assert bench_cohort.ask(question) == "KeyError: 'x'"


def test_a_point_is_measured(monkeypatch):
    monkeypatch.setattr(cohort_point, "ENOUGH_SECONDS", 0.0)
    monkeypatch.setattr(cohort_point, "ENOUGH_REPEATS", 2)
    threads = torch.get_num_threads()
    try:
        found = cohort_point.measure_point(cohort_point.Question("mlp", "reference", 3, "nowhere"))
    finally:
        torch.set_num_threads(threads)
    assert (found.path, found.size, found.repeats) == ("reference", 3, 2)
    assert found.rate > 0
    assert found.growth >= 0


def test_the_picture_of_cohorts_is_drawn(tmp_path):
    points = [point(path, 1, 10.0) for path in cohort_point.ALONE]
    points += [point("cohort", 2**i, 4.0 * 2**i) for i in range(5)]
    file = tmp_path / "cohort.png"
    import_module("cohort_picture").draw({"cnn1d": points, "mlp": points[:1]}, "1 thread", file)
    assert file.read_bytes()[:4] == b"\x89PNG"


def test_examples_of_clients_do_not_overlap():
    shape = cohort_point.NETWORKS["mlp"][0]
    examples = cohort_point.make_examples(2 * cohort_point.EXAMPLES, shape, 6)
    assert prod(examples.x.shape) == 2 * 96 * 600
    rows = [cohort_point.client(n, 96, {}, examples).rows for n in (0, 1)]
    assert np.concatenate(rows).tolist() == list(range(192))
