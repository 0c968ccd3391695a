"""FedRevive: made-up samples, distillation on them, and when which of it takes part."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedge_sim import checkpoint
from fedge_sim.algorithms.asynchronous import Update, average
from fedge_sim.algorithms.distillation import (
    Lesson,
    Teacher,
    Unlabelled,
    class_mix,
    distil,
    rows_by_class,
    teacher_weights,
)
from fedge_sim.algorithms.fedrevive import unlabelled
from fedge_sim.algorithms.generator import Generator
from fedge_sim.algorithms.server_rules import server_rule
from fedge_sim.algorithms.synthesis import Synthesiser, backward_synthesis, statistics_gaps
from fedge_sim.config import load_settings
from fedge_sim.config_devices import FedRevive
from fedge_sim.errors import ConfigError, DataError
from fedge_sim.models import build_model, initialise
from fedge_sim.models.tracker import MEAN, VARIANCE, Tracker
from fedge_sim.training.base import model_arrays

CLASSES, SHAPE = 4, (2, 12)
TINY = (
    *("devices.enable=true", "devices.device_speed.mean=1.0", "devices.device_selection_size=4"),
    *("asynchronous.rule=fedrevive", "asynchronous.beta=constant", "asynchronous.beta_factor=0.5"),
    *("fedrevive.freeze_versions=0", "fedrevive.warmup_versions=0", "fedrevive.noise_size=8"),
    *("fedrevive.generator_width=4", "fedrevive.generator_steps=2", "fedrevive.kd_steps=2"),
    *("fedrevive.synthesis_batch_size=6", "fedrevive.kd_batch_size=4", "fedrevive.kd_lr=0.01"),
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Compute as rules do by default; more threads than free cores only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def settings(*more):
    return load_settings(assignments=[*TINY, *more])


def network(name="cnn1d", shape=SHAPE, seed=0):
    built = build_model(name, shape, CLASSES)
    initialise(built, torch.Generator().manual_seed(seed))
    return built


def rule_of(settings, shape=SHAPE, server=0):
    names = {name for name, _ in network(settings.data.model, shape).named_parameters()}
    return server_rule(settings, names, server, shape, CLASSES)


def update(number, start, seed=None, name="cnn1d", shape=SHAPE, counts=(4, 3, 2, 1)):
    arrays = model_arrays(network(name, shape, seed=number + 1 if seed is None else seed))
    return Update(0, number, 0, 3, sum(counts), counts, arrays, start)


def bytes_of(arrays):
    return {name: array.tobytes() for name, array in arrays.items()}


def says(logits):
    """Return a network that gives the same logits for whatever it sees."""
    layer = nn.Linear(3, len(logits))
    layer.load_state_dict({"weight": torch.zeros(len(logits), 3), "bias": torch.tensor(logits)})
    return layer


# ---------------------------------------------------------------- pure pieces


def test_weights_say_which_teacher_knows_a_class():
    mixes = [class_mix(counts) for counts in ((1, 3, 0), (3, 1, 0))]
    np.testing.assert_array_equal(mixes[0], [0.25, 0.75, 0])
    weights = teacher_weights([Teacher(says([0.0]), mix) for mix in mixes])
    assert weights.tolist() == [[0.25, 0.75, 0], [0.75, 0.25, 0]]  # nobody knows the third


def test_rows_follow_a_mix_of_classes():
    labels = np.array([2, 0, 0, 2, 2, 0, 0, 0])
    random = np.random.default_rng(0)
    rows = rows_by_class(labels, np.array([0.25, 0.0, 0.75]), (40, 50), random)
    assert rows.shape == (40, 50)
    assert abs((labels[rows] == 2).mean() - 0.75) < 0.05
    assert set(rows.ravel().tolist()) == set(range(8))
    absent = rows_by_class(labels, np.array([0.0, 1.0, 0.0]), (100,), random)
    assert set(absent.tolist()) == set(range(8))  # any sample


@pytest.mark.parametrize(
    "shape", [(6, 100), (2, 5), (3, 32, 32), (3, 16, 16), (1, 9, 7), (1, 1, 1)]
)
def test_generated_examples_are_standardised(shape):
    generator = Generator(shape, 8, 4)
    initialise(generator, torch.Generator().manual_seed(0))
    z = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    x = generator(z).detach()
    assert x.shape == (64, *shape)
    axes = (0, *range(2, x.dim()))
    torch.testing.assert_close(x.mean(axes), torch.zeros(shape[0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(x.var(axes, correction=0), torch.ones(shape[0]), atol=0.05, rtol=0)


def test_a_generator_refuses_feature_vectors():
    with pytest.raises(
        ConfigError, match=r'variant = "generator": .*\(561,\): use variant = "light"'
    ):
        Generator((561,), 8, 4)


def test_gaps_of_statistics_by_hand():
    layer = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(2)).eval()
    x = torch.tensor([[0.0, 3.0], [4.0, 3.0]])  # means (2, 3), variances (4, 0)
    with statistics_gaps(layer) as gaps:
        layer(x)
    assert [gap.item() for gap in gaps] == [pytest.approx(math.sqrt(4 + 9) + math.sqrt(9 + 1))]
    layer(x)
    assert len(gaps) == 1  # the hooks are gone
    tracker = nn.Sequential(nn.Flatten(), Tracker(2)).eval()
    with statistics_gaps(tracker) as gaps:
        torch.testing.assert_close(tracker(x), x)
    assert [gap.item() for gap in gaps] == [pytest.approx(math.sqrt(4 + 9) + math.sqrt(9 + 1))]


def test_the_loss_of_synthesis_by_hand():
    logs = np.log([[0.7, 0.3], [0.2, 0.8]])
    mixes = (np.array([0.25, 0.75]), np.array([0.75, 0.25]))
    teachers = [Teacher(says(list(v)), mix) for v, mix in zip(logs, mixes, strict=True)]
    x, y = torch.zeros(2, 3), torch.tensor([0, 1])
    s = FedRevive(one_hot=1.0, adversarial=0.1)
    loss = backward_synthesis(x, y, teachers, None, s).total(s)
    first = -0.25 * math.log(0.7) - 0.75 * math.log(0.2)
    second = -0.75 * math.log(0.3) - 0.25 * math.log(0.8)
    one_hot = (first + second) / 2
    assert loss.item() == pytest.approx(one_hot)
    # The student says class 0, as the first teacher does, whose mean weight is 1/2.
    student = says(list(np.log([0.6, 0.4])))
    gain = 0.5 * (0.7 * math.log(0.7 / 0.6) + 0.3 * math.log(0.3 / 0.4))
    loss = backward_synthesis(x, y, teachers, student, s).total(s)
    assert loss.item() == pytest.approx(one_hot - 0.1 * gain)


def test_the_gradient_of_synthesis_is_that_of_the_sum_over_teachers():
    counts = ((4, 3, 2, 1), (1, 1, 5, 1), (0, 2, 2, 9))
    teachers = [Teacher(network(seed=i), class_mix(own)) for i, own in enumerate(counts)]
    student = network(seed=7).eval().requires_grad_(False)
    s = FedRevive(batch_norm=0.1, adversarial=1.0)
    noise = torch.randn(64, *SHAPE, generator=torch.Generator().manual_seed(1))
    y = torch.arange(64) % CLASSES
    here, there = noise.clone().requires_grad_(), noise.clone().requires_grad_()
    total = backward_synthesis(3 * here, y, teachers, student, s).total(s)

    logits, gaps = [], []
    for own in teachers:
        with statistics_gaps(own.network) as found:
            logits.append(own.network(3 * there))
        gaps.append(torch.stack(found).sum())
    weights = teacher_weights(teachers).float()[:, y]
    said, log_p = student(3 * there), torch.stack(logits).log_softmax(2)
    gain = (log_p.exp() * (log_p - said.log_softmax(1))).sum(2)
    agree = log_p.argmax(2) == said.argmax(1)
    assert 0.05 < agree.float().mean() < 0.95
    entropy = -log_p.gather(2, y.expand(3, -1)[..., None])[..., 0]
    loss = (weights * (entropy - gain * agree)).sum(0).mean()
    loss = loss + 0.1 * (weights.mean(1) * torch.stack(gaps)).sum()
    loss.backward()
    torch.testing.assert_close(total, loss.detach())
    torch.testing.assert_close(here.grad, there.grad, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------- distillation


def real_examples(seed, n=256):
    """Return windows whose class is which half of which channel is high."""
    random = np.random.default_rng(seed)
    y = random.integers(CLASSES, size=n)
    x = random.normal(0, 0.5, (n, *SHAPE)).astype(np.float32)
    for row, label in zip(x, y, strict=True):
        row[label // 2, 6 * (label % 2) :][:6] += 2
    x -= x.mean((0, 2), keepdims=True)
    return torch.from_numpy(x / x.std((0, 2), keepdims=True)), torch.from_numpy(y)


@pytest.fixture(scope="module")
def trained():
    """Return a network that has learnt the windows, and what it is right on."""
    built = network()
    x, y = real_examples(0)
    adam = torch.optim.Adam(built.parameters(), 0.01)
    for _ in range(40):
        adam.zero_grad()
        functional.cross_entropy(built(x), y).backward()
        adam.step()
    x, y = real_examples(1)
    assert (built.eval()(x).argmax(1) == y).float().mean() > 0.95
    return model_arrays(built)


def teacher(arrays, counts=(1, 1, 1, 1)):
    built = network()
    built.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
    return Teacher(built, class_mix(counts))


def divergence(student, lesson):
    """Return KL(targets || student) over all examples of a lesson, BatchNorm by the batch."""
    with torch.no_grad():
        p = functional.log_softmax(student.train()(lesson.x.flatten(0, 2)), 1)
    return functional.kl_div(p, lesson.targets.flatten(0, 2), reduction="batchmean").item()


def test_a_student_moves_towards_its_teachers(trained):
    s = FedRevive(kd_steps=30, kd_batch_size=32, kd_lr=0.01)
    x = real_examples(2)[0].numpy()
    source = Unlabelled(x, s, torch.device("cpu"))
    lesson = source.lesson([teacher(trained), teacher(trained)], np.random.default_rng(0))
    assert lesson.x.shape == (30, 2, 32, *SHAPE)
    torch.testing.assert_close(lesson.targets.sum(3), torch.ones(30, 2, 32))
    student = network(seed=5)
    before = divergence(student, lesson)
    losses = distil(student, lesson, s)
    assert losses[0] > 4 * losses[-1] > 0
    assert divergence(student, lesson) < before / 4


def test_each_teacher_answers_for_its_own_examples():
    """Of a pool of one sample a class, by the classes that each one's client has."""
    s = FedRevive(kd_steps=2, kd_batch_size=5, temperature=2.0)
    source = Synthesiser(Generator((1, 3), 8, 4), s)
    source.x, source.labels = torch.tensor([[[0.0] * 3], [[1.0] * 3]]), np.array([0, 1])
    networks = [nn.Sequential(nn.Flatten(), says(logits)) for logits in ([0.0, 4.0], [0.0, 0.0])]
    mixes = (class_mix((1, 0)), class_mix((0, 1)))
    teachers = [Teacher(network, mix) for network, mix in zip(networks, mixes, strict=True)]
    lesson = source.lesson(teachers, np.random.default_rng(0))
    sure = 1 / (1 + math.exp(2.0))  # of the first one, softened: logits (0, 2)
    for step in range(2):
        assert lesson.x[step, ..., 0, 0].tolist() == [[0.0] * 5, [1.0] * 5]
        right = [[sure] * 5, [0.5] * 5]
        np.testing.assert_allclose(lesson.targets[step, ..., 0], right, rtol=1e-6)


def test_unlabelled_examples_are_drawn_anew_for_each_teacher():
    x = np.arange(40, dtype=np.float32)[:, None].repeat(3, 1)
    source = Unlabelled(x, FedRevive(kd_steps=3, kd_batch_size=8), torch.device("cpu"))
    teachers = [Teacher(says([0.0, 1.0]), class_mix((1, 1))) for _ in range(2)]
    drawn = source.lesson(teachers, np.random.default_rng(0)).x
    assert drawn.shape == (3, 2, 8, 3)
    assert len({tuple(part[:, 0].tolist()) for part in drawn.flatten(0, 1)}) == 6


def test_steps_that_are_not_finite_are_skipped_and_counted():
    """As if they had not been: what BatchNorm or a tracker saw of them is forgotten, too."""
    student = nn.Sequential(Tracker(3), nn.BatchNorm1d(3), says([0.0, 1.0]))
    before = model_arrays(student)
    x = torch.randn(3, 2, 4, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.full((3, 2, 4, 2), 0.5)
    x[0, 1, 2, 0], targets[1] = math.inf, math.nan
    x[2] *= 1e30  # whose variance is infinite
    assert all(map(math.isnan, distil(student, Lesson(x, targets), FedRevive())))
    assert bytes_of(model_arrays(student)) == bytes_of(before)


@pytest.mark.parametrize("name", ["cnn1d", "cnn2d-small", "resnet18-tracked"])
def test_a_student_sees_one_teachers_batch_after_the_other(name):
    """Its statistics are those of the batches in turn, and its loss that of each alone."""
    shape = SHAPE if name == "cnn1d" else (3, 8, 8)
    x = torch.randn(1, 3, 5, *shape, generator=torch.Generator().manual_seed(1))
    x = x * torch.arange(1, 4).view(1, 3, *[1] * (x.dim() - 2))  # of unlike scales
    targets = torch.full((1, 3, 5, CLASSES), 1 / CLASSES)
    student, expected = network(name, shape), network(name, shape).train()
    (loss,) = distil(student, Lesson(x, targets), FedRevive(kd_lr=0.001))
    logits = torch.cat([expected(part).log_softmax(1) for part in x[0]])
    right = functional.kl_div(logits, targets.flatten(0, 2), reduction="batchmean")
    assert loss == pytest.approx(right.item(), rel=1e-5)
    for (key, here), there in zip(student.named_buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(here, there, msg=key)


# ------------------------------------------------------------------ synthesis


def synthesised(trained, rounds, **more):
    s = FedRevive(noise_size=16, generator_width=8, synthesis_batch_size=32, **more)
    generator = Generator(SHAPE, s.noise_size, s.generator_width)
    initialise(generator, torch.Generator().manual_seed(0))
    source = Synthesiser(generator, s)
    own, random = teacher(trained), np.random.default_rng(0)
    for _ in range(rounds):
        source.prepare([own], network(seed=9).eval(), random)
    return source, own


def test_a_teacher_is_sure_of_what_was_made_up_for_it(trained):
    source, own = synthesised(trained, 6, generator_steps=10, max_samples=128)
    assert source.x.shape == (128, *SHAPE)  # the newest
    assert source.x.dtype == torch.float32
    right = (own.network(source.x).argmax(1).numpy() == source.labels).mean()
    assert right > 0.8  # chance is 0.25
    assert set(source.labels.tolist()) == set(range(CLASSES))


def gap(network, x):
    with statistics_gaps(network) as gaps, torch.no_grad():
        network(x)
    return sum(gap.item() for gap in gaps)


def test_samples_come_to_look_like_what_batch_norm_has_seen(trained):
    first, own = synthesised(trained, 1, generator_steps=1, one_hot=0.0, batch_norm=1.0)
    last, _ = synthesised(trained, 6, generator_steps=10, one_hot=0.0, batch_norm=1.0)
    assert gap(own.network, last.x[-32:]) < 0.6 * gap(own.network, first.x)


def test_the_generator_itself_learns(trained):
    """What it makes of new noise is better after some rounds, without any training of a copy."""

    def gap_after(rounds):
        more = {"generator_steps": 10, "one_hot": 0.0, "batch_norm": 1.0}
        source, own = synthesised(trained, rounds, **more)
        z = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
        return gap(own.network, source.generator(z))

    assert gap_after(10) < 0.8 * gap_after(0)


def test_what_stands_for_a_class_is_drawn_anew_and_added_with_a_weight(trained):
    """A generator knows no class: what its copies are given for one is forgotten."""
    seen = []
    for weight in (0.2, 0.7):
        source, own = synthesised(trained, 0, generator_steps=1, class_weight=weight)
        synthesise = source.synthesise

        def spy(labels, noise, classes, *others, synthesise=synthesise):
            seen.append((labels, noise.clone(), classes.clone()))
            return synthesise(labels, noise, classes, *others)

        source.synthesise = spy
        random = np.random.default_rng(0)
        for _ in range(2):
            labels_now, inputs = len(seen), []
            hook = source.generator.layers.register_forward_pre_hook(
                lambda _, given, to=inputs: to.append(given[0].detach().clone())
            )
            source.prepare([own], network(seed=9).eval(), random)
            hook.remove()
            labels, noise, classes = seen[labels_now]
            assert classes.shape == (CLASSES, 16)
            torch.testing.assert_close(inputs[0], noise + weight * classes[labels])
    assert not torch.equal(seen[0][2], seen[1][2])


def test_what_a_copy_left_as_it_was_stays(trained):
    """Adam has no epsilon here: where there never was a difference, it would divide 0 by 0."""
    source, _ = synthesised(trained, 0)
    clone = copy.deepcopy(source.generator)
    before, *_ = (p.detach().clone() for p in source.generator.parameters())
    with torch.no_grad():
        next(clone.parameters())[0] += 1e-6  # however near: the sign decides
    source._move_towards(clone)
    after, *_ = source.generator.parameters()
    assert torch.equal(after[1:], before[1:])
    torch.testing.assert_close(after[0], before[0] + 0.003)


def test_teachers_that_are_not_finite_teach_nothing(trained):
    broken = {n: a * np.nan if a.dtype.kind == "f" else a for n, a in trained.items()}
    source, _ = synthesised(trained, 0, generator_steps=2)
    before = [p.detach().clone() for p in source.generator.parameters()]
    source.prepare([teacher(broken)], network().eval(), np.random.default_rng(0))
    assert len(source.labels) == 0
    for then, now in zip(before, source.generator.parameters(), strict=True):
        assert torch.equal(then, now)
    assert len(source.lesson([teacher(broken)], np.random.default_rng(0)).x) == 0


# -------------------------------------------------------------------- the rule

START = model_arrays(network())
PARAMETERS = {name for name, _ in network().named_parameters()}


def versions(rule, numbers, model=START):
    for version, number in enumerate(numbers, 1):
        model = rule.make_version(model, [update(number, model)], version)
    return model


@pytest.mark.parametrize(
    ("name", "shape"),
    [("cnn1d", (6, 100)), ("cnn2d", (3, 32, 32)), ("cnn2d", (3, 16, 16)), ("cnn2d", (1, 9, 7))],
)
def test_windows_and_images_of_any_size(name, shape):
    none = [] if name == "cnn1d" else ["fedrevive.batch_norm=0.0"]
    rule = rule_of(settings(f"app.config.model={name}", *none), shape)
    start = model_arrays(network(name, shape))
    new = rule.make_version(start, [update(0, start, name=name, shape=shape)], 2)
    assert {n: (a.shape, a.dtype) for n, a in new.items()} == {n: (a.shape, a.dtype) for n, a in start.items()}  # fmt: skip
    assert all(np.isfinite(array).all() for array in new.values())
    assert rule.source.x.shape == (6, *shape)
    assert rule.skipped_steps == 0


def test_a_rule_computes_with_its_own_number_of_threads(monkeypatch):
    used = []
    rule = rule_of(settings("runtime.threads_per_client=2", "fedrevive.kd_steps=1"))
    prepare = rule.source.prepare
    monkeypatch.setattr(
        rule.source,
        "prepare",
        lambda *a, **k: (used.append(torch.get_num_threads()), prepare(*a, **k)),
    )
    versions(rule, range(1))
    assert used == [2]


def test_the_same_updates_make_the_same_bytes():
    runs = [versions(rule_of(settings()), range(3)) for _ in range(2)]
    assert bytes_of(runs[0]) == bytes_of(runs[1])
    other = versions(rule_of(settings(), server=1), range(3))  # another generator, other noise
    assert bytes_of(runs[0]) != bytes_of(other)


@pytest.mark.parametrize(
    ("name", "shape", "max_samples"),
    [("cnn1d", SHAPE, 4096), ("cnn1d", SHAPE, 10), ("cnn2d", (3, 8, 12), 10)],
)
def test_a_rule_goes_on_from_a_checkpoint(tmp_path, name, shape, max_samples):
    s = settings(
        f"app.config.model={name}",
        f"fedrevive.max_samples={max_samples}",
        "fedrevive.teacher_buffer_size=2",
        "fedrevive.adversarial_start=4",
        *([] if name == "cnn1d" else ["fedrevive.batch_norm=0.0"]),
    )
    start = model_arrays(network(name, shape))

    def go_on(rule, model, first, last):
        for version in range(first, last + 1):
            one = update(version, model, name=name, shape=shape)
            model = rule.make_version(model, [one], version)
        return model

    whole, begun, resumed = (rule_of(s, shape) for _ in range(3))
    expected = go_on(whole, start, 1, 5)
    halfway = go_on(begun, start, 1, 3)
    checkpoint.save(tmp_path / "state", {"rule": begun.state(), "model": halfway})
    tree = checkpoint.load(tmp_path / "state")
    resumed.restore(tree["rule"])
    assert bytes_of(go_on(resumed, tree["model"], 4, 5)) == bytes_of(expected)
    assert bytes_of(go_on(rule_of(s, shape), halfway, 4, 5)) != bytes_of(expected)


def test_the_newest_models_are_the_teachers():
    rule = rule_of(settings("fedrevive.teacher_buffer_size=3", "fedrevive.freeze_versions=9"))
    versions(rule, range(5))
    expected = [model_arrays(network(seed=number + 1))["head.bias"] for number in (2, 3, 4)]
    for own, bias in zip(rule.teachers, expected, strict=True):
        np.testing.assert_array_equal(own.network.head.bias.detach(), bias)
        np.testing.assert_array_equal(own.mix, [0.4, 0.3, 0.2, 0.1])


def plain(model, one):
    return average(model, [one], lambda _: 1.0, 1.0, PARAMETERS)


def test_first_frozen_then_the_generator_warms_up_then_all_of_it():
    """While it warms up, an update counts less, and there is nothing in the place of the rest."""
    rule = rule_of(settings("fedrevive.freeze_versions=1", "fedrevive.warmup_versions=2"))
    model, samples, came = START, [], []
    for version in (1, 2, 3, 4):
        one = update(version, model)
        new = rule.make_version(model, [one], version)
        samples.append(len(rule.source.labels))
        raw = [average(model, [one], lambda _, w=w: w, 1.0, PARAMETERS) for w in (1.0, 0.5)]
        came.append([bytes_of(new) == bytes_of(a) for a in raw])
        model = new
    assert samples == [0, 6, 12, 18]
    assert came == [[True, False], [False, True], [False, True], [False, False]]


def test_the_adversarial_term_waits_for_so_many_syntheses():
    surer = {n: np.asarray(a * 3) if n.startswith("head") else a for n, a in START.items()}
    one = replace(update(0, START), arrays=surer)  # says what the server's model says

    def samples(adversarial, start):
        more = (f"fedrevive.adversarial={adversarial}", f"fedrevive.adversarial_start={start}")
        rule = rule_of(settings(*more, "fedrevive.generator_steps=4"))
        made = []
        for version in (1, 2):
            rule.make_version(START, [one], version)
            made.append(rule.source.x[-6:].numpy().tobytes())
        return made

    without, late, early = samples(0.0, 1), samples(50.0, 2), samples(50.0, 1)
    assert late[0] == without[0] != early[0]
    assert late[1] != without[1]
    assert samples(50.0, 3) == without
    assert FedRevive().adversarial_start == 100


def test_statistics_that_no_layer_keeps_cannot_be_matched():
    for name, shape in (("mlp", SHAPE), ("cnn2d", (3, 8, 8)), ("resnet18", (3, 4, 4))):
        match = rf"batch_norm = 0.003: .* {name} keeps none: set 0.0, or a model"
        with pytest.raises(ConfigError, match=match):
            rule_of(settings(f"app.config.model={name}"), shape)
        rule_of(settings(f"app.config.model={name}", "fedrevive.batch_norm=0.0"), shape)
    for name in ("cnn2d-small", "resnet18-tracked"):
        rule_of(settings(f"app.config.model={name}"), (3, 8, 8))


def test_a_fresh_update_is_taken_as_it_is():
    rule = rule_of(settings("asynchronous.beta=linear"))
    one = replace(update(0, START), staleness=0)
    assert bytes_of(rule.make_version(START, [one], 2)) == bytes_of(plain(START, one))
    assert len(rule.source.labels) == 0
    assert len(rule.teachers) == 1


def test_beta_weighs_the_raw_and_the_distilled_update():
    def made(beta):
        rule = rule_of(settings(f"asynchronous.beta_factor={beta}", "fedrevive.adversarial=0.0"))
        return rule.make_version(START, [update(0, START)], 2)

    raw, half, stale = plain(START, update(0, START)), made(0.5), made(1.0)
    floats = {n for n, a in START.items() if a.dtype.kind == "f"}
    for name in floats:  # parameters and statistics alike
        np.testing.assert_allclose(half[name], (raw[name] + stale[name]) / 2, atol=1e-6)
        assert np.abs(stale[name] - START[name]).max() > 0
    for name in PARAMETERS:
        assert np.abs(stale[name] - START[name]).max() < 0.021  # two steps of Adam at 0.01


def test_a_version_has_trackers_as_new():
    name, shape = "resnet18-tracked", (3, 8, 8)
    rule = rule_of(settings(f"app.config.model={name}"), shape)
    start = model_arrays(network(name, shape))
    one = update(0, start, name=name, shape=shape)
    tracked = {n for n in start if n.endswith((MEAN, VARIANCE))}
    assert len(tracked) == 40  # of 20 convolutions
    moved = {n: a + 0.5 if n in tracked else a for n, a in one.arrays.items()}
    new = rule.make_version(start, [replace(one, arrays=moved)], 2)
    for key in tracked:
        np.testing.assert_array_equal(new[key], start[key])  # 0 and 1
        teacher = rule.teachers[-1].network.state_dict()[key]
        np.testing.assert_array_equal(teacher, moved[key])
    assert any(not np.array_equal(new[n], start[n]) for n in start.keys() - tracked)


def test_the_light_variant_distils_on_unlabelled_examples(saved, trained):
    file = saved({"x": real_examples(4)[0].numpy()})
    light = ("fedrevive.variant=light", f"fedrevive.unlabelled_data={file}")
    s = settings(*light, "asynchronous.beta_factor=1.0", "fedrevive.kd_steps=30", "fedrevive.kd_batch_size=32")  # fmt: skip
    one = replace(update(0, START), arrays=trained, start=START)
    x, y = real_examples(5)

    def accuracy(arrays):
        student = teacher(arrays).network.train()  # by the batch: statistics are not distilled
        return (student(x).argmax(1) == y).float().mean()

    rule = rule_of(s)
    new = rule.make_version(START, [one], 2)
    assert accuracy(new) > 0.9 > accuracy(START)
    assert rule.state()["source"] == {}


# -------------------------------------------------------- unlabelled examples


def test_unlabelled_images_may_have_their_channels_last(saved):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3)).astype(np.uint8)
    x = unlabelled(saved({"x": images}), (3, 4, 6))
    assert x.shape == (5, 3, 4, 6)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x.mean((0, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(x.std((0, 2, 3)), 1, atol=1e-6)
    first = images.transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(unlabelled(saved({"x": first}), (3, 4, 6)), x)
    windows = images[:, 0]  # 6 samples of 3 channels
    x = unlabelled(saved({"x": windows.transpose(0, 2, 1)}), (3, 6))
    np.testing.assert_array_equal(unlabelled(saved({"x": windows}), (3, 6)), x)


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"y": np.zeros(3)}, "an .npz file with an array x"),
        ({"x": np.zeros((3, 2, 11))}, r"\(N, 2, 12\) .* not float64 \(3, 2, 11\)"),
        ({"x": np.zeros((0, 2, 12))}, r"not float64 \(0, 2, 12\)"),
        ({"x": np.full((3, 2, 12), "a")}, "must be numbers"),
        ({"x": np.full((3, 2, 12), np.inf)}, "NaN or infinity"),
        ({"x": np.array([None])}, "an .npz file with an array x"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value")
def test_unlabelled_data_are_refused_in_one_line(saved, arrays, problem):
    with pytest.raises(DataError, match=problem) as caught:
        unlabelled(saved(arrays), SHAPE)
    assert "\n" not in str(caught.value)
    assert "unlabelled_data" in str(caught.value)


def test_a_missing_or_foreign_file_is_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "one.npy", np.zeros((3, *SHAPE)))
    for name in ("none.npz", "text.npz", "one.npy"):
        with pytest.raises(DataError, match=name):
            unlabelled(tmp_path / name, SHAPE)
