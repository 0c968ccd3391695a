"""Callbacks: what a run leaves behind and shows."""

import logging

from rich.console import Console
from rich.logging import RichHandler

from fedge_sim.config import Settings
from fedge_sim.reporting.base import Callback
from fedge_sim.reporting.progress import ConsoleReporter, VersionReporter
from fedge_sim.reporting.stopping import EarlyStopping, TargetAccuracy
from fedge_sim.reporting.tables import TableWriter
from fedge_sim.reporting.timeline import TimelineWriter
from fedge_sim.reporting.versions import VersionWriter
from fedge_sim.reporting.weights import WeightWriter


def callbacks_of(settings: Settings, console: Console) -> list[Callback]:
    """Return what a run with these settings has."""
    return (version_callbacks if settings.by_versions else standard_callbacks)(console)


def version_callbacks(console: Console) -> list[Callback]:
    """Return what every run of versions has: the same for devices."""
    files = [VersionWriter(), WeightWriter(), TimelineWriter()]
    return [*files, EarlyStopping(), TargetAccuracy(), VersionReporter(console)]


def standard_callbacks(console: Console) -> list[Callback]:
    """Return what every run of rounds has: its files, early ends, the console's view of it."""
    files = [TableWriter(), WeightWriter(), TimelineWriter()]
    return [*files, EarlyStopping(), TargetAccuracy(), ConsoleReporter(console)]


def start_logging(console: Console) -> None:
    """Send this package's log to the console, above the progress bar if there is one."""
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False)
    else:
        handler = logging.StreamHandler(console.file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    package = logging.getLogger("fedge_sim")
    package.handlers = [handler]
    package.setLevel(logging.INFO)
    package.propagate = False
