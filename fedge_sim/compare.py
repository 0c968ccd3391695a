"""``python -m fedge_sim.compare``: runs methods on the same clients and makes the table of them.

A seed's examples are dealt out once, under the topology that is set, and written down as partition
files, which all methods then read, each under its own topology.
"""

import hashlib
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from filelock import FileLock, Timeout
from rich.console import Console

from fedge_sim import checkpoint, orchestrator
from fedge_sim.checkpoint import differs
from fedge_sim.config import Settings, load_settings, split_overrides
from fedge_sim.data import FederatedData, federate
from fedge_sim.errors import CheckpointError, ConfigError, FedgeError, StalledError, suggest
from fedge_sim.methods import METHODS, Method
from fedge_sim.models import build_model
from fedge_sim.reporting import standard_callbacks, start_logging
from fedge_sim.reporting.comparison import Entry, Run, figures_of, read_run
from fedge_sim.reporting.figures import draw_figures, file_name
from fedge_sim.reporting.progress import ConsoleReporter
from fedge_sim.reporting.published import show, write_tables
from fedge_sim.reporting.tables import write_json
from fedge_sim.unread import told, unread

log = logging.getLogger(__name__)

STATE = "state.json"  # beside a run's results folder: its settings, and that folder when finished
ALL_ROUNDS = ("hierarchy.es_patience=0", "hierarchy.target_accuracy=0.0")  # unless set
MATTERS = ("precision", "min_clients_per_round")  # to a result, of the table runtime
# What methods may have of their own, of app.config.
OWN = ("output-dir", "partition-file", "partition", "model", "standardise")


class Variant(NamedTuple):
    """One row of the table: a method, and settings of its own beside it."""

    label: str
    title: str
    method: Method
    more: tuple[str, ...] = ()


class Planned(NamedTuple):
    """One run: whose, its settings, and where it goes."""

    variant: Variant
    settings: Settings
    place: Path


# ---------------------------------------------------------------------- what is asked for


def parse_variants(methods: str, also: Sequence[str]) -> list[Variant]:
    """Return what ``--methods`` and ``--also`` ask for, or raise ConfigError."""
    names = [name.strip() for name in methods.split(",")]
    variants = [Variant(name, _method(name).title, _method(name)) for name in names]
    for text in also:
        label, _, rest = (part.strip() for part in text.partition(":"))
        name, _, more = rest.partition(" ")
        if not name or not label.isprintable() or not re.search(r"\w", label):
            raise ConfigError(
                f'--also {text!r}: expected "LABEL: METHOD TABLE.KEY=VALUE ...", for example '
                '"Fedge+SCAFFOLD: fedge hierarchy.client_rule=scaffold"'
            )
        variants.append(Variant(label, label, _method(name), tuple(split_overrides(more))))
    seen: set[str] = set()
    for variant in variants:
        own = {file_name(text).casefold() for text in (variant.label, variant.title)}
        if own & seen:
            raise ConfigError(f"{variant.label!r} is named twice: give one of them another label")
        seen |= own
    return variants


def _method(name: str) -> Method:
    if name not in METHODS:
        raise ConfigError(f"method {name!r}: unknown; {suggest(name, METHODS)}")
    return METHODS[name]


def parse_seeds(text: str) -> list[int]:
    """Return the seeds of ``"42,43"``, or raise ConfigError."""
    parts = [part.strip() for part in text.split(",")]
    good = all(re.fullmatch(r"\d{1,18}", part, re.ASCII) for part in parts)
    if not good or len(set(map(int, parts))) < len(parts):
        raise ConfigError(f"--seeds {text}: expected different integers from 0, as 42,43,44")
    return [int(part) for part in parts]


def plan_run(
    config: Path | None, common: Sequence[str], variant: Variant, seed: int, folder: Path
) -> Planned:
    """Return a run: the common settings, then the method's, then those of its own.

    Raises
    ------
    ConfigError
        If they are refused, or the method would not have the same clients as the others.
    """
    base = load_settings(config, assignments=common, seed=str(seed))
    place = folder / "runs" / file_name(variant.label) / f"seed_{seed}"
    deals = base.hierarchy.clients_per_server
    _refuse_overruled(base, common, variant)
    assignments = [*common, *variant.method.assignments(deals), *variant.more]
    own = load_settings(config, assignments=assignments, lenient=True)
    servers = own.hierarchy.clients_per_server
    file = toml(str(_partition_file(folder, seed, servers)))
    assignments += ["app.config.partition=file", f"app.config.partition-file={file}"]
    settings = load_settings(
        config, assignments=assignments, output_dir=place, seed=str(seed), lenient=True
    )
    if settings.by_versions:
        raise ConfigError("devices that are drawn or asynchronous have no rounds to compare here")
    if servers != variant.method.clients_per_server(deals):
        shape = {"flat": "one leaf server for all clients", "clients": "one for each client"}
        wanted = shape.get(variant.method.topology, f"{list(deals)} clients, as the others")
        raise ConfigError(f"needs {wanted}, not clients_per_server = {list(servers)}")
    before, now = (s.data.model_dump(by_alias=True) for s in (base, settings))
    for key in before.keys() - OWN:
        if before[key] != now[key]:
            raise ConfigError(f"app.config.{key} must be the same for all methods: use --set")
    return Planned(variant, settings, place)


def toml(value: object) -> str:
    """Return a value as TOML writes it."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{toml(str(k))} = {toml(v)}' for k, v in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _refuse_overruled(base: Settings, common: Sequence[str], variant: Variant) -> None:
    """Raise ConfigError if ``--set`` asks a method for what it is not, or ``--also`` for a seed."""
    tables = _tables(base)
    of_its_own = {_path(text) for text in variant.more}
    for path in {_path(text) for text in common} - of_its_own:
        table, _, key = path.partition(".")
        own = variant.method.settings.get(path)
        if own is not None and tables[table][key] != own:
            raise ConfigError(
                f"--set {path}: the method has {toml(own)}; for another value add a row, --also "
                f'"LABEL: {variant.label} {path}=VALUE"'
            )
    if "app.config.seed" in of_its_own:
        raise ConfigError("app.config.seed: give seeds with --seeds")


def _path(assignment: str) -> str:
    return assignment.partition("=")[0].strip()


def refuse_other_settings(planned: Planned, where: Path, before: Any) -> None:
    """Raise ConfigError if a run has other settings, as a file or folder says, than it gets now."""
    if difference := differs(before, identity(_tables(planned.settings))):
        raise ConfigError(
            f"{where}: there is a run with other settings ({difference}); "
            f"choose another --output-dir, or delete {planned.place}"
        )


def tell_without_effect(plan: Sequence[Planned]) -> None:
    """Log which settings none of the methods reads, and which a row has for nothing."""
    rows = {planned.variant.label: planned for planned in plan}
    unheeded = {label: list(unread(planned.settings)) for label, planned in rows.items()}
    of_all = [key for key in unheeded[plan[0].variant.label] if not key.reason.data]  # dealt out
    of_all = [key for key in of_all if all(key in keys for keys in unheeded.values())]
    if text := told(of_all):
        log.warning(text)
    for label, planned in rows.items():
        own = {_path(text) for text in planned.variant.more}
        if text := told([k for k in unheeded[label] if k.path in own and k not in of_all]):
            log.warning("%s: %s", label, text)


def identity(tables: dict[str, Any]) -> dict[str, Any]:
    """Return what makes a run the same run: all settings but paths, and how it is carried out."""
    tables = deepcopy(tables)
    for key in checkpoint.PATHS:
        del tables["app"]["config"][key]
    tables["runtime"] = {key: tables["runtime"][key] for key in MATTERS}
    return tables


def _tables(settings: Settings) -> dict[str, Any]:
    return settings.model_dump(mode="json", by_alias=True)


# ---------------------------------------------------------------------- clients


def _partition_file(folder: Path, seed: int, servers: Sequence[int]) -> Path:
    digest = hashlib.sha256(json.dumps(list(servers)).encode()).hexdigest()[:8]
    return folder / "partitions" / f"seed_{seed}_{len(servers)}_servers_{digest}.json"


def deal(base: Settings, plan: Sequence[Planned]) -> None:
    """Deal a seed's examples out, check that its runs can use them, and write them down.

    Raises
    ------
    ConfigError, DataError
        If data, networks and clients do not go together, or other clients are written down.
    """
    data = federate(base)
    for variant, settings, place in plan:
        try:
            _check_network(settings, data)
        except ConfigError as error:
            raise ConfigError(f"method {variant.label}: {error}") from None
        rows = {
            str(leaf): {str(c): data.clients[c].listed(data.sides_given) for c in clients}
            for leaf, clients in enumerate(settings.hierarchy.leaf_clients)
        }
        file = Path(settings.data.partition_file)
        written: Any = None  # or lost, or damaged
        with suppress(OSError, ValueError, RecursionError):
            written = json.loads(file.read_text(encoding="utf-8"))
        if written not in (None, rows):
            raise ConfigError(
                f"{file}: clients have other examples there than they would get now; choose "
                "another --output-dir, or set data and partition as they were"
            )
        for begun in _begun(place):
            with suppress(CheckpointError):  # it is named when the run's turn comes
                began = checkpoint.load(begun / checkpoint.NAME, arrays=False)["began"]
                now = data.dataset.content, checkpoint.digest_of_clients(data.clients)
                if (began["data"], began["clients"]) != now:
                    raise ConfigError(f"{begun}: had other data; choose another --output-dir")
        if written is None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, rows, indent=None)


def _check_network(settings: Settings, data: FederatedData) -> None:
    orchestrator.check_strategy(settings)
    model = build_model(settings.data.model, data.example_shape, len(data.classes))
    orchestrator.check_network(settings, model)


# ---------------------------------------------------------------------- runs


def _state(place: Path) -> dict[str, Any]:
    """Return what is written down of a place; nothing, if that is damaged: checkpoints know it."""
    with suppress(OSError, ValueError, RecursionError):
        match json.loads((place / STATE).read_text(encoding="utf-8")):
            case {"settings": dict(), "finished": str() | None} as state:
                return dict(state)
    return {}


def _begun(place: Path) -> list[Path]:
    """Return the results folders in a place that have a finished round, the oldest first."""
    return sorted(file.parent for file in place.glob(f"*/{checkpoint.NAME}"))


def finish(planned: Planned, console: Console) -> tuple[Run, bool]:
    """Return a finished run, run now unless it was before, and whether it was.

    Raises
    ------
    FedgeError
        If it fails, or what there is of it is not what it has written.
    """
    settings, place = planned.settings, planned.place
    finished = _state(place).get("finished")
    begun = [place / finished] if finished else _begun(place)
    try:
        if begun and _is_over(planned, begun[-1]):
            folder = begun[-1]
        else:
            place.mkdir(parents=True, exist_ok=True)
            _write_state(planned, None)
            everything = standard_callbacks(console)
            callbacks = [c for c in everything if not isinstance(c, ConsoleReporter)]
            if begun:
                folder = orchestrator.resume(begun[-1], lambda _: callbacks).folder
            else:
                folder = orchestrator.run(settings, callbacks).folder
    except CheckpointError as error:
        raise CheckpointError(f"{error} (to have it run anew, delete {place})") from None
    run = read_run(folder, settings.seed)
    if not finished:
        _write_state(planned, folder.name)
    return run, bool(finished)


def _is_over(planned: Planned, folder: Path) -> bool:
    """Whether a run has ended; its checkpoint must be of this run, and its files whole then."""
    tree = checkpoint.load(folder / checkpoint.NAME, arrays=False)
    refuse_other_settings(planned, folder, identity(tree["began"]["settings"]))
    if tree["ended"]:
        checkpoint.settings_to_go_on_with(folder, tree)
        checkpoint.check_files(folder, tree)
    return bool(tree["ended"])


def _write_state(planned: Planned, finished: str | None) -> None:
    settings = identity(_tables(planned.settings))
    write_json(planned.place / STATE, {"settings": settings, "finished": finished})


def run_all(plan: Sequence[Planned], console: Console) -> tuple[list[Entry], bool]:
    """Do all runs; return what came of each variant, and whether some thread may hang."""
    titles = {planned.variant.label: planned.variant.title for planned in plan}
    runs: dict[str, list[Run]] = {label: [] for label in titles}
    failed: dict[str, dict[int, str]] = {label: {} for label in titles}
    hangs = False
    for number, planned in enumerate(plan, 1):
        label, seed, started = planned.variant.label, planned.settings.seed, time.perf_counter()
        name = f"[{number}/{len(plan)}] {label} seed {seed}"
        if not _state(planned.place).get("finished"):
            console.print(f"{name} ...", highlight=False, soft_wrap=True)
        try:
            run, before = finish(planned, console)
        except FedgeError as error:
            failed[label][seed] = " ".join(str(error).split())
            hangs |= isinstance(error, StalledError)
            log.error("%s: failed: %s", name, failed[label][seed])
            continue
        runs[label].append(run)
        took = "done before" if before else f"{time.perf_counter() - started:.0f} s"
        accuracy = 100 * figures_of(run)["final_accuracy"]
        console.print(f"{name}: {accuracy:.1f} % ({took})", highlight=False, soft_wrap=True)
    bounds = {planned.variant.label for planned in plan if planned.variant.method.bound}
    entries = [Entry(titles[k], tuple(runs[k]), failed[k], k in bounds) for k in titles]
    return entries, hangs


def compare(
    config: Path | None,
    common: Sequence[str],
    variants: Sequence[Variant],
    seeds: Sequence[int],
    target: float | None,
    folder: Path | None,
    console: Console,
) -> tuple[bool, bool]:
    """Plan, deal out, run, and write the tables; return whether runs failed, and one hangs."""
    bases = [load_settings(config, assignments=common, seed=str(seed)) for seed in seeds]
    data = bases[0].data
    folder = (folder or Path(data.output_dir) / f"compare_{data.dataset}").expanduser().absolute()
    plan, refused = [], []
    for seed in seeds:
        for variant in variants:
            try:
                plan.append(plan_run(config, common, variant, seed, folder))
            except ConfigError as error:
                refused.append(f"method {variant.label}: {error}")
    if refused:
        raise ConfigError("; ".join(dict.fromkeys(refused)))
    for planned in plan:
        if state := _state(planned.place):
            refuse_other_settings(planned, planned.place / STATE, state["settings"])
    tell_without_effect(plan)
    asked = [{"label": v.label, **asdict(v.method), "more": v.more} for v in variants]
    common_to_all = identity(_tables(bases[0]))
    asked_for = {"methods": asked, "seeds": seeds, "target": target, "base": common_to_all}
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0).acquire()
    except Timeout:
        raise ConfigError(f"{folder}: another comparison is at work there") from None
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written to ({error.strerror})") from None
    with lock:
        for base in bases:
            deal(base, [planned for planned in plan if planned.settings.seed == base.seed])
        write_json(folder / "compare.json", asked_for)
        entries, hangs = run_all(plan, console)
        write_tables(folder, entries, target)
        draw_figures(folder / "figures", entries)
    show(entries, target, console)
    asked_labels = {file_name(variant.label) for variant in variants}
    others = sorted({p.name for p in (folder / "runs").iterdir()} - asked_labels)
    if others:
        console.print(f"not asked for, and not in the table: {', '.join(others)}", highlight=False)
    console.print(f"tables and figures: {folder}", highlight=False, soft_wrap=True)
    return any(entry.failed for entry in entries), hangs


def main(
    methods: Annotated[
        str, typer.Option(metavar="NAME,NAME,...", help=f"Of {', '.join(METHODS)}.")
    ],
    seeds: Annotated[str, typer.Option(metavar="S,S,...")] = "42,43,44",
    dataset: Annotated[str | None, typer.Option(help="As app.config.dataset.")] = None,
    rounds: Annotated[int | None, typer.Option(help="As hierarchy.global_rounds.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file, as for fedge_sim.orchestrator.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Of all methods; repeatable."),
    ] = None,
    also: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL: METHOD TABLE.KEY=VALUE ...",
            help="One more row: a method with settings of its own; repeatable.",
        ),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Count rounds and seconds up to this accuracy, as 0.9."),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Given again, what is finished there is not run again; else "
            "compare_<dataset> in the output-dir that is set."
        ),
    ] = None,
) -> None:
    """Run methods on the same clients, with several seeds, and make the table of them."""
    try:
        console = Console(markup=False)
        if not console.is_terminal:
            console = Console(markup=False, width=160)
        start_logging(console)
        logging.getLogger("fedge_sim").setLevel(logging.WARNING)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # to end as Ctrl-C does
        common = [*ALL_ROUNDS]
        given = {"app.config.dataset": dataset, "hierarchy.global_rounds": rounds}
        for text in assignments or []:
            if given.get(_path(text)) is not None:
                raise ConfigError(f"--set {text}: is given by an option of its own, too")
        if dataset is not None:
            common.append(f"app.config.dataset={toml(dataset)}")
        if rounds is not None:
            common.append(f"hierarchy.global_rounds={rounds}")
        common += assignments or []
        variants = parse_variants(methods, also or [])
        failed, hangs = compare(
            config, common, variants, parse_seeds(seeds), target, output_dir, console
        )
    except FedgeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        typer.echo("stopped; the same command goes on from here", err=True)
        raise typer.Exit(130) from None
    if hangs:  # a thread that hangs would keep the process
        sys.stdout.flush()
        os._exit(1)
    if failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    command = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    command.command()(main)
    command()
