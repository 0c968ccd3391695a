"""The ServerApp: Flower's FedAvg, with a note of when each round starts."""

import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from plain_flower.networks import NETWORKS

app = ServerApp()


class TimedFedAvg(FedAvg):
    """FedAvg that adds the time of every round's start to a file of JSON lines."""

    def __init__(self, stamps: Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stamps = stamps

    def stamp(self) -> None:
        """Note the time."""
        with self.stamps.open("a") as file:
            file.write(json.dumps({"time": time.time()}) + "\n")

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Note the time, then do as FedAvg does."""
        self.stamp()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Do as FedAvg does, but fail if a client did: a round without it would look fast."""
        replies = list(replies)
        if failed := [reply.error.reason for reply in replies if reply.has_error()]:
            raise RuntimeError(f"{len(failed)} clients failed in round {server_round}: {failed[0]}")
        return super().aggregate_train(server_round, replies)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds."""
    config = context.run_config
    net = NETWORKS[str(config["model"])](int(config["num-classes"]))
    arrays = ArrayRecord(net.state_dict())
    num_clients = int(config["num-clients"])
    strategy = TimedFedAvg(
        Path(str(config["stamps"])),
        fraction_evaluate=0.0 if config["empty"] else 1.0,
        min_train_nodes=num_clients,
        min_available_nodes=num_clients,
    )
    strategy.start(grid, arrays, num_rounds=int(config["num-server-rounds"]))
    strategy.stamp()  # the end of the last round
