"""The Flower ServerApp: the orchestrator around Flower's grid."""

import logging
import sys

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from rich.console import Console

from fedge_sim.config import environment_seed, load_settings
from fedge_sim.orchestrator import conduct
from fedge_sim.reporting import callbacks_of, start_logging
from fedge_sim.runtime.flower_grid import FlowerGrid
from fedge_sim.unread import told, unread

log = logging.getLogger(__name__)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the orchestrator with the settings of the app's bundle and of ``flwr run -c``."""
    console = Console(file=sys.stdout, force_terminal=False, width=100)
    start_logging(console)
    if seed := environment_seed():
        log.warning(
            "SEED=%s is ignored here: it may be left over in the SuperLink's environment from an "
            "earlier run; use flwr run . -c 'seed=%s'",
            seed,
            seed,
        )
    settings = load_settings(app_config=context.run_config)
    if without_effect := told(unread(settings, under_flower=True)):
        log.warning(without_effect)
    conduct(settings, FlowerGrid(grid, settings.runtime), callbacks_of(settings, console))
