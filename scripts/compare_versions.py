"""Compares rules on the same devices: accuracy against simulated time and against updates.

Every rule gets the same number of updates; each run is one of ``python -m fedge_sim.orchestrator``.
A run that is finished is not done again.
"""

import csv
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from fedge_sim.config import load_settings

ROOT = Path(__file__).resolve().parents[1]
JOB = ROOT / "scripts" / "jobs" / "cifar10_16px.toml"
# Of each rule: what it is called, and its settings. Rates are those of the research jobs, but
# FedAvg's is 1; FedBuff, too, makes a version of each update.
RULES = {
    "FedAvg": ("asynchronous.rule=fedavg", "hierarchy.server_lr=1.0"),
    "FedAsync": (
        "asynchronous.rule=fedasync",
        "asynchronous.staleness=polynomial",
        "asynchronous.mixing=0.6",
    ),
    "FedBuff": ("asynchronous.rule=fedbuff", "hierarchy.server_lr=0.05"),
    "Down-weighting": ("asynchronous.rule=downweight", "hierarchy.server_lr=0.1"),
    "FedRevive": (
        "asynchronous.rule=fedrevive",
        "hierarchy.server_lr=0.1",
        "fedrevive.generator_width=32",
        "fedrevive.synthesis_batch_size=32",
    ),
}
Point = tuple[float, float, float]  # simulated seconds, updates, accuracy


def main(
    config: Annotated[Path, typer.Option(help="The job.")] = JOB,
    seeds: Annotated[str, typer.Option()] = "42,43,44",
    rules: Annotated[str, typer.Option(help="Some of the rules.")] = ",".join(RULES),
    also: Annotated[
        list[str] | None,
        typer.Option(help='"LABEL: RULE TABLE.KEY=VALUE ...": a rule with other settings.'),
    ] = None,
    updates: Annotated[int, typer.Option(help="Of every run.")] = 1000,
    assignments: Annotated[list[str] | None, typer.Option("--set")] = None,
    target: Annotated[float, typer.Option(help="Accuracy up to which time is counted.")] = 0.5,
    output: Annotated[Path, typer.Option()] = Path("results/versions"),
) -> None:
    """Run what is not done yet, then print the table and draw the figure."""
    variants = {name: _rule(name) for name in rules.split(",") if name}
    for text in also or []:
        label, _, rest = text.partition(":")
        name, *more = rest.split()
        variants[label.strip()] = (*_rule(name), *more)
    runs: dict[str, list[dict[str, object]]] = {label: [] for label in variants}
    for seed in seeds.split(","):
        for label, settings in variants.items():
            place = output / label.replace(" ", "_") / f"seed_{seed}"
            common = [f"app.config.seed={seed}", *(assignments or [])]
            runs[label].append(_run(config, place, [*common, *settings], updates))
            print(f"{label} seed {seed}: {runs[label][-1]['points'][-1]}", flush=True)  # type: ignore[index]
    print(_table(runs, target))
    _draw(runs, output / "accuracy.png")


def _rule(name: str) -> tuple[str, ...]:
    if name not in RULES:
        raise typer.BadParameter(f"{name!r} is unknown; there is {', '.join(RULES)}")
    return RULES[name]


def _run(config: Path, place: Path, settings: list[str], updates: int) -> dict[str, object]:
    done = place / "done.json"
    job = load_settings(config, assignments=settings)
    each = job.updates_for_model
    if updates < each:
        raise typer.BadParameter(f"--updates {updates}: a version alone has {each}")
    versions = [f"devices.max_model_version={updates // each}"]
    if each > 1:  # still an evaluation for so many updates, or for each version
        versions += [f"devices.eval_frequency={max(1, job.devices.eval_frequency // each)}"]
    asked = {"config": str(config), "settings": [*settings, *versions]}
    told = json.loads(done.read_text()) if done.exists() else {}
    if told and told["asked"] != asked:
        raise typer.BadParameter(f"{place} has a run with other settings: take another --output")
    if not told:
        sets = [part for text in asked["settings"] for part in ("--set", text)]
        command = [sys.executable, "-m", "fedge_sim.orchestrator", "--config", str(config)]
        shutil.rmtree(place, ignore_errors=True)  # what was begun
        place.mkdir(parents=True)
        started = time.perf_counter()
        with (place / "log.txt").open("w") as log:
            call = subprocess.run(
                [*command, *sets, "--output-dir", str(place)], cwd=ROOT, stdout=log, stderr=log
            )
        if call.returncode:
            raise SystemExit((place / "log.txt").read_text().splitlines()[-1])
        told = {"asked": asked, "seconds": time.perf_counter() - started}
        done.write_text(json.dumps(told))
    [folder] = [file.parent for file in place.glob("*/run.json")]
    [file] = folder.glob("metrics/*/held_out.csv")
    with file.open(newline="") as opened:
        points = [
            (float(row["simulated_seconds"]), float(row["updates"]), float(row["accuracy"]))
            for row in csv.DictReader(opened)
            if row["what"] == "cloud" and row["server"] == "-1"
        ]
    return {"points": points, "seconds": told["seconds"]}


def _table(runs: dict[str, list[dict[str, object]]], target: float) -> str:
    """Return the table in Markdown: mean and standard deviation over seeds."""
    # The moment at which the first rule has all its updates: what the others have by then.
    at = min(run["points"][-1][0] for own in runs.values() for run in own)  # type: ignore[index]
    lines = [
        f"| rule | final, % | last fifth of updates, % | at {at:.0f} simulated s, % "
        f"| simulated s to {100 * target:g} % | updates to {100 * target:g} % "
        "| simulated s in all | real s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for label, own in runs.items():
        all_points: list[list[Point]] = [run["points"] for run in own]  # type: ignore[misc]
        reached = [next((p for p in points if p[2] >= target), None) for points in all_points]
        counted = [point for point in reached if point]
        to_target = [
            f"{statistics.mean(point[i] for point in counted):.0f}"
            + (f" ({len(counted)} of {len(own)})" if len(counted) < len(own) else "")
            if counted
            else "never"
            for i in (0, 1)
        ]
        cells = [
            _mean([100 * points[-1][2] for points in all_points]),
            _mean([100 * _of_the_last_fifth(points) for points in all_points]),
            _mean([100 * _at(points, at) for points in all_points]),
            *to_target,
            f"{statistics.mean(points[-1][0] for points in all_points):.0f}",
            f"{statistics.median(float(run['seconds']) for run in own):.0f}",  # type: ignore[arg-type]
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _of_the_last_fifth(points: list[Point]) -> float:
    """Return the mean accuracy in the last fifth of the updates: one evaluation alone is chance."""
    return statistics.mean(p[2] for p in points if p[1] > 0.8 * points[-1][1])


def _at(points: list[Point], seconds: float) -> float:
    """Return the last accuracy that was known by a time; 0 before the first."""
    return next((p[2] for p in reversed(points) if p[0] <= seconds), 0.0)


def _mean(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def _draw(runs: dict[str, list[dict[str, object]]], file: Path) -> None:
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure

    from fedge_sim.reporting.figures import DPI, LINE_COLOURS, LINE_STYLES, STYLE, WIDTH

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2 * WIDTH, 2.6), layout="constrained")
        for i, (axes, name) in enumerate(
            zip(figure.subplots(1, 2, sharey=True), ("simulated seconds", "updates"), strict=True)
        ):
            for number, (label, own) in enumerate(runs.items()):
                all_points = [np.array(run["points"]) for run in own]
                grid = np.linspace(0, min(points[-1, i] for points in all_points), 200)
                curves = [np.interp(grid, p[:, i], 100 * p[:, 2]) for p in all_points]
                mean, spread = np.mean(curves, axis=0), np.std(curves, axis=0)
                colour = LINE_COLOURS[number % len(LINE_COLOURS)]
                style = LINE_STYLES[number % len(LINE_STYLES)]
                axes.plot(grid, mean, style, color=colour, label=label)
                axes.fill_between(grid, mean - spread, mean + spread, color=colour, alpha=0.15)
            axes.set_xlabel(name)
        figure.axes[0].set_ylabel("held-out accuracy, %")
        figure.axes[1].legend(frameon=False)
        figure.savefig(file, dpi=DPI)


if __name__ == "__main__":
    typer.run(main)
