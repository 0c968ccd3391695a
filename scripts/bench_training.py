"""The workloads of clients that train: under this application, plain Flower, and neither.

Run as a script, this is one of our sides.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import flops
import torch
from flops import Sgemm, sgemm
from measuring import Measurement, Options, header, measure_flower, measure_script, verdict
from stamps import stamp
from workloads import CIFAR, OURS, W1, W1_FULL, Workload

from fedge_sim.config import load_settings
from fedge_sim.models import build_model
from fedge_sim.orchestrator import run
from fedge_sim.reporting.base import Callback, RoundRecord, RunInfo
from fedge_sim.reporting.tables import TableWriter
from fedge_sim.reporting.weights import WeightWriter
from fedge_sim.runtime.in_process import available_cores

BACKENDS = {"inprocess": "ours, in one process", "ray": "ours, Ray"}
# What training = "auto" settles on, on a CPU, in a run of 100 rounds: compiled steps, which
# threads of one process would wait for. A bench's few rounds would not repay the compiler.
COMPILED = {"inprocess": "false", "ray": "true"}
FLOWER, BARE = "plain Flower", "bare PyTorch loop"
BARE_LOOP = Path(__file__).resolve().parent / "bare_loop.py"
PROCESSES_ON_GPU = 2  # of the bare loop; on a CPU, one a core
LONG_ROUND = 60.0  # seconds; where the first takes longer, it is the only one
PROJECTED_ROUNDS = 100
# What we aim for: each target, and how far we would like to go beyond it.
RATIO, USEFUL = (0.5, 0.4), (50.0, 60.0)
FULL_ON_GPU, CIFAR_ON_GPU = 3.0, 0.5  # seconds a round

Sides = Mapping[str, Measurement]


def bench_w1(options: Options) -> None:
    """Measure all sides on W1, and our targets."""
    sides, rates = measure_sides(W1, options)
    shares = print_useful_work(W1, sides, rates)
    name = faster(sides)
    ratio, share = sides[name].median / sides[FLOWER].median, shares[name]
    print(target(f"{name} / plain Flower, seconds", ratio, "at most", RATIO))
    print(target(f"{name}, useful work, % of sgemm", share, "at least", USEFUL))


def bench_full(options: Options) -> None:
    """Measure our sides on as many windows as HHAR has."""
    sides, rates = measure_sides(W1_FULL, options, yardsticks=False)
    print_useful_work(W1_FULL, sides, rates)
    for name, side in sides.items():
        hours, minutes = divmod(round(PROJECTED_ROUNDS * side.median / 60), 60)
        print(f"{f'{name}, {PROJECTED_ROUNDS} rounds as long':<64}{hours} h {minutes:02} min")
    print_gpu_target(sides, FULL_ON_GPU)


def bench_cifar(options: Options) -> None:
    """Measure all sides on many devices with few images each."""
    sides, rates = measure_sides(CIFAR, options)
    print_useful_work(CIFAR, sides, rates)
    print_gpu_target(sides, CIFAR_ON_GPU)


# ------------------------------------------------------------------ all sides


def measure_sides(
    workload: Workload, options: Options, yardsticks: bool = True
) -> tuple[Sides, list[Sgemm]]:
    """Measure one side after the other; print a line each, and the ratios.

    Returns
    -------
    sides : mapping
        By name.
    rates : list of Sgemm
        The machine's, before the sides, between them and after.
    """
    columns = ("s/round", "fastest", "slowest", "warm-up", "to start", "peak MiB", "other cores")
    print(header(str(workload), options.rounds, options.assignments))
    print(f"{'':<22}" + "".join(f"{column:>10}" for column in columns[:-1]) + f"{columns[-1]:>13}")
    workload.write(options.folder / "data")
    sides, rates = {}, [sgemm()]
    for name, measure in sides_of(workload, options, yardsticks).items():
        alone = any(len(side.seconds) == 1 for side in sides.values())
        sides[name] = measure(1 if alone else options.rounds + 1)
        rates.append(sgemm())
        print(line(name, sides[name]), flush=True)
    if any(len(side.seconds) == 1 for side in sides.values()):
        print(f"(a round takes more than {LONG_ROUND:.0f} s: one is measured, without a warm-up)")
    print("", *ratios(sides), sep="\n")
    return sides, rates


def sides_of(
    workload: Workload, options: Options, yardsticks: bool
) -> dict[str, Callable[[int], Measurement]]:
    """Return a function from rounds to a measurement for each side, by name."""

    def ours(backend: str, rounds: int) -> Measurement:
        folder = options.folder / backend
        arguments = [workload.to_json(), backend, str(rounds), str(folder)]
        return measure_script(__file__, [*arguments, *options.assignments], folder)

    def flower(rounds: int) -> Measurement:
        config = workload.yardstick_config(options.folder / "data", rounds)
        clients = len(workload.client_sizes)
        return measure_flower(config, clients, options.folder / "plain-flower")

    def bare(rounds: int) -> Measurement:
        config = workload.yardstick_config(options.folder / "data", rounds)
        processes = PROCESSES_ON_GPU if torch.cuda.is_available() else available_cores()
        folder = options.folder / "bare"
        arguments = [json.dumps({**config, "processes": processes}), str(folder)]
        return measure_script(str(BARE_LOOP), arguments, folder)

    sides = {name: partial(ours, backend) for backend, name in BACKENDS.items()}
    return {**sides, FLOWER: flower, BARE: bare} if yardsticks else sides


def line(name: str, side: Measurement) -> str:
    """Return a side's line of the table."""
    warm_up = side.seconds[0] if len(side.seconds) > 1 else math.nan
    times = (side.median, min(side.measured), max(side.measured), warm_up, side.start)
    columns = "".join(f"{'-':>10}" if math.isnan(t) else f"{t:10.2f}" for t in times)
    return f"{name:<22}{columns}{side.peak:10,.0f}{side.other_cores:13.2f}"


def ratios(sides: Sides) -> list[str]:
    """Return a line for each pair of sides that is worth a comparison."""
    ours = [name for name in BACKENDS.values() if name in sides]
    pairs = [(mine, other) for other in (FLOWER, BARE) for mine in ours] + [(BARE, FLOWER)]
    return [
        f"{f'{a} / {b}':<43}seconds {sides[a].median / sides[b].median:.2f}   "
        f"memory {sides[a].peak / sides[b].peak:.2f}"
        for a, b in pairs
        if a in sides and b in sides
    ]


def faster(sides: Sides) -> str:
    """Return the name of our fastest side."""
    return min(BACKENDS.values(), key=lambda name: sides[name].median)


# ------------------------------------------------------------------ useful work


def print_useful_work(workload: Workload, sides: Sides, rates: Sequence[Sgemm]) -> dict[str, float]:
    """Print the useful FLOP/s of all sides; return each as a percentage of sgemm's.

    The best rate of sgemm counts: other programs slow it down at times, which would flatter us.
    """
    shape = tuple(workload.example_shape)
    work = flops.count(build_model(workload.model, shape, workload.num_classes), shape)
    examples, best = sum(workload.batches), max(rates, key=lambda rate: rate.each)
    total = examples * work.training_flops
    measured = ", ".join(f"{rate.each / 1e9:,.0f}" for rate in rates)
    print(f"\nuseful work  {total / 1e12:.3f} TFLOP a round: {examples:,} training examples x")
    print(f"             {work}")
    print("             (convolutions and linear layers, forward and twice that backward, less")
    print("             the first layer's gradient with respect to its input; no normalisation,")
    print("             activation, pooling, optimiser, nor evaluation)")
    print(f"sgemm        {best}")
    print(f"             the best of {len(rates)} medians, between the sides: {measured}\n")
    shares = {}
    for name, side in sides.items():
        useful = total / side.median
        shares[name] = 100 * useful / best.total
        what = f"{shares[name]:.1f} % of sgemm's {best.total / 1e9:,.0f}"
        print(f"{name:<22}{useful / 1e9:10,.1f} useful GFLOP/s, {what}")
    print()
    return shares


def target(what: str, value: float, limit: str, levels: Sequence[float]) -> str:
    """Return a line: what was measured, our target, and how far we would like to go beyond it.

    Parameters
    ----------
    what : str
    value : float
    limit : str
        ``"at most"`` or ``"at least"``.
    levels : sequence of float
        Target and stretch.
    """
    sign = 1 if limit == "at most" else -1
    first, stretch = (sign * value <= sign * level for level in levels)
    text = verdict(what, value, f"{limit} {levels[0]:g}", first, digits=2)
    return f"{text}; stretch: {limit} {levels[1]:g}: {'met' if stretch else 'MISSED'}"


def print_gpu_target(sides: Sides, seconds: float) -> None:
    """Print what we aim for on a GPU, beside what was measured if there is one."""
    if torch.cuda.is_available():
        name = faster(sides)
        value = sides[name].median
        print(verdict(f"{name}, s/round", value, f"at most {seconds:g}", value <= seconds))
    else:
        print(f"The target, at most {seconds:g} s a round, is for a GPU; there is none here.")


# ------------------------------------------------------------------ our sides


class LongRoundError(Exception):
    """Ends a run whose first round took so long that no second one is waited for."""


class Stamps(Callback):
    """Notes when the first round starts and when each has ended, its result files written."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._started = math.nan

    def on_run_start(self, info: RunInfo) -> None:
        """Note the time."""
        stamp(self._folder)
        self._started = time.perf_counter()

    def on_round_end(self, record: RoundRecord) -> None:
        """Note the time, but fail if a client did: a round without it would look fast."""
        if not all(client.bytes_up for client in record.clients):
            raise RuntimeError(f"a client failed in round {record.global_round}")
        stamp(self._folder)
        if record.global_round == 1 and time.perf_counter() - self._started > LONG_ROUND:
            raise LongRoundError


def run_ours(
    workload: Workload, backend: str, rounds: int, folder: Path, more: Sequence[str]
) -> None:
    """Run this application from here, as ``python -m fedge_sim.orchestrator`` does."""
    # As many workers as plain Flower takes; on a GPU, as the profile has it.
    workers = "auto" if torch.cuda.is_available() else available_cores()
    tables = {
        "app.config.dataset": "arrays",
        "app.config.data-root": folder.parent / "data" / OURS,
        "app.config.cache-dir": folder / "cache",
        "app.config.partition": "user",
        "app.config.model": workload.model,
        "app.config.num-classes": workload.num_classes,
        "app.config.output-dir": folder / "results",
        "hierarchy.num_servers": len(workload.sizes),
        "hierarchy.clients_per_server": [len(leaf) for leaf in workload.sizes],
        "hierarchy.global_rounds": rounds,
        "runtime.backend": backend,
        "runtime.num_workers": workers,
        "runtime.compile": '"auto"' if torch.cuda.is_available() else COMPILED[backend],
        "hierarchy.prox_mu": 0.0,  # which the other sides do not have
    } | {f"hierarchy.{key}": value for key, value in workload.training.items()}
    pairs = [f"{key}={value}" for key, value in tables.items()]
    settings = load_settings(assignments=[*pairs, *more])
    with suppress(LongRoundError):
        run(settings, [TableWriter(), WeightWriter(), Stamps(folder)])


if __name__ == "__main__":
    own, backend, rounds, folder, *more = sys.argv[1:]
    run_ours(Workload.from_json(own), backend, int(rounds), Path(folder), more)
