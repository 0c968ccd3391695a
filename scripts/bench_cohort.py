"""The workload ``cohort``: clients a second by how many are trained together, and their memory.

Every point has a process of its own with one thread, so that its memory is its own.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from cohort_picture import draw
from cohort_point import ALONE, COHORT, EXAMPLES, NETWORKS, Point, Question
from measuring import MIB, Options, header

POINT = Path(__file__).resolve().parent / "cohort_point.py"
SIZES = tuple(2**power for power in range(9))
MEMORY_SHARE = 0.25  # of the free memory, that a cohort may take
LONGEST_POINT = 60.0  # seconds, by the time of the size before: a longer one is left out
TIMEOUT = 300.0  # of a process, compilation included


def bench(options: Options) -> None:
    """Measure all networks and ways to train; draw what was found."""
    if options.assignments:
        print("cohort measures the ways to train themselves: --set has no effect on it")
    where = "on the GPU" if torch.cuda.is_available() else "1 thread"
    print(header(f"cohort: clients of {EXAMPLES} examples, 1 epoch of 3 steps, {where}"))
    columns = ("clients/s", "ms a client", "memory, MiB", "a client")
    found: dict[str, list[Point]] = {}
    for network, (shape, _) in NETWORKS.items():
        print(f"{network} {shape}")
        print(f"  {'way to train':<12}{'together':>10}", end="")
        print("".join(f"{c:>14}" for c in columns) + f"{'repeats':>10}{'cores':>10}", flush=True)
        found[network] = measure_network(network, options.folder)
        print()
    for network, points in found.items():
        print(verdict(network, points))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    draw(found, where, options.output)
    print(f"picture   {options.output}")


def measure_network(name: str, folder: Path) -> list[Point]:
    """Measure one client at a time in every way, then growing cohorts; print every point."""
    points: list[Point] = []
    for path in (*ALONE, COHORT):
        last: Point | None = None
        for size in SIZES if path == COHORT else SIZES[:1]:
            if last and (problem := too_large(last, size)):
                print(f"  {path}: none of {size} or more, as {problem}", flush=True)
                break
            answer = ask(Question(name, path, size, str(folder / "compiled")))
            if isinstance(answer, str):
                print(f"  {path}: none of {size} or more, as it failed: {answer}", flush=True)
                break
            points.append(last := answer)
            print(last, flush=True)
    return points


def too_large(last: Point, size: int) -> str:
    """Return why clients are too many to be tried, judged by the last size; nothing if not."""
    times = size / last.size
    memory, allowed = times * last.growth, MEMORY_SHARE * last.free
    if memory > allowed:
        needs = f"{memory / MIB:,.0f} MiB would be needed"
        return f"{needs}, more than {MEMORY_SHARE:.0%} of what is free ({allowed / MIB:,.0f} MiB)"
    seconds = 2 * times * last.seconds  # a warm-up, and one that counts
    if seconds > LONGEST_POINT:
        return f"two calls would take {seconds:.0f} s, more than {LONGEST_POINT:.0f} s"
    return ""


def ask(question: Question) -> Point | str:
    """Measure a point in a fresh process; return it, or what went wrong there."""
    command = [sys.executable, str(POINT), json.dumps(asdict(question))]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return f"no answer within {TIMEOUT:.0f} s"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return lines[-1]
    return Point(**json.loads(done.stdout.splitlines()[-1]))


def verdict(network: str, points: Sequence[Point]) -> str:
    """Return from which size on a cohort beats one client at a time."""
    alone = max((p for p in points if p.path in ALONE), key=lambda p: p.rate, default=None)
    cohorts = [p for p in points if p.path == COHORT]
    if alone is None or not cohorts:
        return f"{network}: nothing to compare"
    one = f"one client at a time ({alone.path}, {alone.rate:.1f} clients a second)"
    wins = [p.size for p in cohorts if p.rate > alone.rate]
    if not wins:
        return (
            f"{network}: a cohort never beats {one} on this hardware, up to {cohorts[-1].size} "
            "together"
        )
    best = max(cohorts, key=lambda p: p.rate)
    span = "on" if wins[-1] == cohorts[-1].size else f"to {wins[-1]}"
    return (
        f"{network}: a cohort beats {one} from {wins[0]} together {span}; most with {best.size}: "
        f"{best.rate:.1f} clients a second, {best.rate / alone.rate:.2f} times as many"
    )
