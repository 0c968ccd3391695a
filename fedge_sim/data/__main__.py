"""``python -m fedge_sim.data``: make a dataset's store ahead of a run, and see what is in it."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedge_sim.config import Settings, environment_seed, load_settings
from fedge_sim.data import DATASETS, FederatedData, federate, load_dataset
from fedge_sim.data.base import Dataset, form_of, warn_of_form
from fedge_sim.data.partition import in_order
from fedge_sim.errors import FedgeError

MOST_ROWS = 60  # of a table; the totals are of all
MOST_DRAWN = 1000  # devices that are looked at, of those that draw their examples

DatasetName = Annotated[str, typer.Argument(help="Name of the dataset.")]
DataRoot = Annotated[Path | None, typer.Option(help="The file or folder that it is read from.")]
Config = Annotated[Path | None, typer.Option(help="TOML file with tool.flwr tables, as for a run.")]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="TABLE.KEY=VALUE",
        help="Override a setting, for example --set app.config.use-watches=false; repeatable.",
    ),
]

app = typer.Typer(
    add_completion=False,
    help=f"Make a dataset's store ahead of a run, and see what is in it: {', '.join(DATASETS)}.",
)


@app.command()
def prepare(
    dataset: DatasetName,
    data_root: DataRoot = None,
    config: Config = None,
    assignments: Assignments = None,
) -> None:
    """Make the dataset's store, once, and print its examples by user and class."""
    with _console() as console:
        _show(console, _settings(dataset, data_root, config, assignments))


@app.command()
def describe(
    dataset: DatasetName,
    data_root: DataRoot = None,
    config: Config = None,
    assignments: Assignments = None,
) -> None:
    """Print the examples by user and class, and how unlike the clients of a run would be."""
    with _console() as console:
        settings = _settings(dataset, data_root, config, assignments)
        _show(console, settings)
        data = federate(settings)
        counts = label_counts(data)
        distance, sizes = label_distance(counts), counts.sum(axis=1)
        console.print(_client_table(data, settings, counts, distance))
        console.print(
            f"distance: mean {distance.mean():.3f}, largest {distance.max():.3f} (total variation "
            "of the shares of classes to those of all clients: 0 the same, 1 no class in common)\n"
            f"examples of a client: {sizes.min():,} to {sizes.max():,}, a factor of "
            f"{sizes.max() / sizes.min():.1f}; {_used(data, sizes)}",
            highlight=False,
            soft_wrap=True,
        )


def _used(data: FederatedData, sizes: NDArray[np.int64]) -> str:
    """Say how many of the examples there are for the clients."""
    if data.whole is None:
        return f"{sizes.sum():,} of {len(data.dataset):,} are used"
    return (
        f"drawn from {len(data.whole.train):,}, with {len(data.whole.test):,} held out; these are "
        f"the first {len(sizes):,} of {len(data.clients):,} devices"
    )


def label_counts(data: FederatedData) -> NDArray[np.int64]:
    """Return the examples (clients, classes) that each client has for training and testing.

    Of devices that draw theirs, it is the first 1,000 that are looked at.
    """
    clients = data.clients if data.whole is None else data.clients[:MOST_DRAWN]
    labels = (
        data.labels_of(client)[np.concatenate([own.train, own.test])]
        for client, own in enumerate(clients)
    )
    return np.stack([np.bincount(own, minlength=len(data.classes)) for own in labels])


def label_distance(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return how far each client's shares of classes are from those of all clients together.

    Parameters
    ----------
    counts : int64 array (clients, classes)

    Returns
    -------
    float64 array (clients,)
        Total variation distance, half the sum of absolute differences: 0 to 1.
    """
    shares = counts / counts.sum(axis=1, keepdims=True)
    overall = counts.sum(axis=0) / counts.sum()
    return np.asarray(abs(shares - overall).sum(axis=1) / 2)


@contextmanager
def _console() -> Iterator[Console]:
    """Log to a console, and end with one line and an exit code on a user's mistake."""
    console = Console(markup=False)  # names are what they are
    if not console.is_terminal:
        console = Console(markup=False, width=140)
    # Warnings say what was left out; the progress bar shows the rest.
    handler = RichHandler(console=console, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    try:
        yield console
    except FedgeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


def _settings(
    dataset: str, data_root: Path | None, config: Path | None, assignments: Sequence[str] | None
) -> Settings:
    own = [f"app.config.dataset={dataset}"]
    if data_root is not None:
        quoted = json.dumps(str(data_root), ensure_ascii=False)  # as TOML does
        own.append(f"app.config.data-root={quoted}")
    return load_settings(config, assignments=[*(assignments or []), *own], seed=environment_seed())


def _show(console: Console, settings: Settings) -> None:
    """Open the dataset, with a progress bar while its store is made, and print its table."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task("opening", total=1.0)
        dataset = load_dataset(
            settings.data,
            lambda what, share: progress.update(task, description=what, completed=share),
        )
    warn_of_form(settings.data, dataset.example_shape)
    console.print(_user_table(dataset, settings.data.dataset))
    for file in dataset.report.get("files", []):
        console.print(_reading(file), highlight=False, soft_wrap=True)


def _reading(file: Mapping[str, Any]) -> str:
    """Say what was read from a file of HHAR, and what of it was left out."""
    unknown = ", ".join(f"{label!r} {n:,}" for label, n in file["unknown_labels"].items())
    return (
        f"{file['file']}: {file['rows']:,} rows; left out: {file['null_labels']:,} labelled null, "
        f"{file['bad_rows']:,} without time, reading or name, unknown labels: {unknown or 'none'}"
    )


def _user_table(dataset: Dataset, name: str) -> Table:
    classes, users = dataset.names.classes, dataset.names.users
    form = form_of(dataset.example_shape)
    table = Table(title=f"{name}: {len(dataset):,} examples of {form}, by user and class")
    for header in ("user", *classes, "all"):
        table.add_column(header, justify="right")
    codes = dataset.user.astype(np.int64) * len(classes) + dataset.y
    if users:
        counts = np.bincount(codes, minlength=len(users) * len(classes))
        by_user = counts.reshape(-1, len(classes))
        for place in in_order(users)[:MOST_ROWS]:
            row = by_user[place]
            table.add_row(users[place], *(f"{n:,}" for n in (*row, row.sum())))
    if len(users) > MOST_ROWS:
        table.add_row(f"{len(users) - MOST_ROWS} more")
    total = np.bincount(dataset.y, minlength=len(classes))
    table.add_section()
    table.add_row("all", *(f"{n:,}" for n in (*total, total.sum())))
    return table


def _client_table(
    data: FederatedData,
    settings: Settings,
    counts: NDArray[np.int64],
    distance: NDArray[np.float64],
) -> Table:
    config = settings.data
    split = "given" if data.sides_given else config.split
    table = Table(
        title=f"partition {config.partition}, split {split}, seed {settings.seed}: clients"
    )
    group = ["group"] if data.groups else []
    for header in ("leaf", "client", *group, "training", "test", "distance", *data.classes):
        table.add_column(header, justify="right")
    per_server = settings.hierarchy.clients_per_server
    servers = np.repeat(np.arange(len(per_server)), per_server)
    for client, own in enumerate(data.clients[:MOST_ROWS]):
        planted = data.groups[client : client + 1]
        numbers = (servers[client], client, *planted, len(own.train), len(own.test))
        by_class = (f"{n:,}" for n in counts[client])
        table.add_row(*(f"{n:,}" for n in numbers), f"{distance[client]:.3f}", *by_class)
    if len(data.clients) > MOST_ROWS:
        table.add_row(f"{len(data.clients) - MOST_ROWS} more")
    return table


if __name__ == "__main__":
    app()
