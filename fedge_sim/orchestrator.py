"""The global-round loop: clients train under leaf servers, the cloud groups the leaves.

``python -m fedge_sim.orchestrator`` runs it in this process or on Ray's actors; ``flwr run .``
runs the same class over Flower's grid (:mod:`fedge_sim.server_app`).
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fedge_sim import cloud, records
from fedge_sim.cloud import CloudState
from fedge_sim.config import Settings, environment_seed, load_settings
from fedge_sim.data.base import DataSummary
from fedge_sim.errors import FedgeError, StalledError
from fedge_sim.leaf import ClientWork, LeafServer
from fedge_sim.models import build_model, initialise
from fedge_sim.randomness import torch_generator
from fedge_sim.reporting import standard_callbacks, start_logging
from fedge_sim.reporting.base import (
    Callback,
    ClientDone,
    ClientRound,
    LeafRound,
    RoundRecord,
    RunInfo,
    new_results_folder,
)
from fedge_sim.runtime.backend import open_grid
from fedge_sim.runtime.node import Done
from fedge_sim.runtime.roster import call_roster, settle_training, survey
from fedge_sim.training.base import model_arrays
from fedge_sim.training.local import Evaluation, pool

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.serverapp import Grid

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """How a run ended: its results folder and the record of its last round."""

    folder: Path
    last: RoundRecord


class Orchestrator:
    """Runs the whole hierarchy over a grid.

    Parameters
    ----------
    settings : Settings
    grid : Grid
        Carries the messages: Flower's, or one of :mod:`fedge_sim.runtime`.
    callbacks : sequence of Callback
        Told of the run's start, of every global round, of its end; in this order.
    """

    def __init__(
        self, settings: Settings, grid: "Grid", callbacks: Sequence[Callback] = ()
    ) -> None:
        self.settings = settings
        self.grid = grid
        self.callbacks = callbacks

    def run(self) -> Result:
        """Run all global rounds, into a results folder of its own.

        Raises
        ------
        FedgeError
            If settings and data do not fit, a client has no node, or a round cannot go on.
        """
        h = self.settings.hierarchy
        for key, value in h.without_effect.items():
            log.warning("[hierarchy] %s = %s: accepted, but without effect", key, value)
        roster = call_roster(self.grid, h.num_clients, self.settings.runtime.node_timeout_s)
        data = survey(self.grid, roster, self.settings)
        self.settings = settle_training(self.grid, roster, self.settings)
        model = build_model(self.settings.data.model, data.example_shape, len(data.classes))
        initialise(model, torch_generator(self.settings.seed, "initial model"))
        trainable = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}

        state = cloud.initial_state(model_arrays(model), h.num_servers)
        leaves = [
            LeafServer(index, clients, roster, self.settings, trainable.keys(), data)
            for index, clients in enumerate(h.leaf_clients)
        ]
        folder = new_results_folder(self.settings)
        info = RunInfo(self.settings, folder, data, num_parameters=sum(trainable.values()))
        try:
            for callback in self.callbacks:
                callback.on_run_start(info)
            for _ in range(h.global_rounds):
                state, record = self._global_round(state, leaves, data)
                for callback in self.callbacks:
                    callback.on_round_end(record)
            for callback in self.callbacks:
                callback.on_run_end(record)
        finally:
            for callback in self.callbacks:
                callback.close()
        return Result(folder, record)

    def _global_round(
        self, state: CloudState, leaves: Sequence[LeafServer], data: DataSummary
    ) -> tuple[CloudState, RoundRecord]:
        """Train under every leaf, do the cloud's step, evaluate what came of it."""
        started = time.perf_counter()
        h = self.settings.hierarchy
        global_round = state.global_round + 1
        lr = h.learning_rate(global_round)
        accepted = [leaf.begin(state.model_for(leaf.index)) for leaf in leaves]
        for server_round in range(1, h.server_rounds_per_global + 1):
            flat_round = state.global_round * h.server_rounds_per_global + server_round
            self._train(leaves, flat_round, lr)
        state = cloud.step(
            state,
            [leaf.model for leaf in leaves],
            [leaf.num_examples for leaf in leaves],
            self.settings.cloud_cluster,
            global_lr=h.global_lr,
            trainable=leaves[0].trainable,
        )
        self._evaluate(leaves, state)
        record = RoundRecord(
            global_round=global_round,
            lr=lr,
            leaves=tuple(
                _leaf_round(leaf, state, took_cloud_model, data)
                for leaf, took_cloud_model in zip(leaves, accepted, strict=True)
            ),
            central_train=pool(leaf.pooled(records.GLOBAL, "train") for leaf in leaves),
            central_test=pool(leaf.pooled(records.GLOBAL) for leaf in leaves),
            cloud=state,
            seconds=time.perf_counter() - started,
        )
        return state, record

    def _train(self, leaves: Sequence[LeafServer], flat_round: int, lr: float) -> None:
        """Do one server round at all leaves: one barrier, so that no core waits for a leaf."""
        config = records.train_config(self.settings, lr)
        messages = [
            message
            for leaf in leaves
            for message in leaf.configure_train(
                flat_round, records.to_record(leaf.model), config, self.grid
            )
        ]
        replies = self._exchange(messages)
        for leaf in leaves:
            leaf.aggregate_train(flat_round, replies.get((records.TRAIN, leaf.index), []))

    def _evaluate(self, leaves: Sequence[LeafServer], state: CloudState) -> None:
        """Evaluate, at every client, its leaf's model, the cloud's for it, and the global one.

        With one cluster the last two are the same model, which is evaluated once.
        """
        cloud_models = [records.to_record(model) for model in state.cluster_models]
        one_cluster = len(cloud_models) == 1
        plans = [(records.LEAF, ["test"])]
        if one_cluster:
            plans += [(records.CLOUD, ["test", "train"])]
        else:
            plans += [(records.CLOUD, ["test"]), (records.GLOBAL, ["test", "train"])]
        configs = {p: records.evaluate_config(self.settings, p, splits) for p, splits in plans}
        global_model = cloud_models[0] if one_cluster else records.to_record(state.global_model)
        messages = []
        for leaf in leaves:
            models = {
                records.LEAF: records.to_record(leaf.model),
                records.CLOUD: cloud_models[state.labels[leaf.index]],
                records.GLOBAL: global_model,
            }
            for purpose, config in configs.items():
                messages += leaf.configure_evaluate(
                    state.global_round, models[purpose], config, self.grid
                )
        replies = self._exchange(messages)
        for leaf in leaves:
            for purpose in configs:
                leaf.aggregate_evaluate(state.global_round, replies.get((purpose, leaf.index), []))
            if one_cluster:
                leaf.evaluations[records.GLOBAL] = leaf.evaluations.get(records.CLOUD, {})

    def _exchange(self, messages: "list[Message]") -> "dict[tuple[str, int], list[Message]]":
        """Send messages, wait for the replies, and sort them by purpose and leaf."""
        # Most work first, so that no core is left waiting for a large client that began last.
        messages.sort(key=lambda message: -records.work_of(message))
        sorted_replies: dict[tuple[str, int], list[Message]] = {}
        for reply in self.grid.send_and_receive(messages):
            if address := records.Address.of(reply):
                sorted_replies.setdefault((address.purpose, address.leaf), []).append(reply)
        return sorted_replies


def _leaf_round(
    leaf: LeafServer, state: CloudState, gate_accepted: bool, data: DataSummary
) -> LeafRound:
    return LeafRound(
        leaf=leaf.index,
        cluster=state.labels[leaf.index],
        gate_accepted=gate_accepted,
        leaf_test=leaf.pooled(records.LEAF),
        cloud_test=leaf.pooled(records.CLOUD),
        clients=tuple(_client_round(leaf, client, data) for client in leaf.clients),
    )


def _client_round(leaf: LeafServer, client: int, data: DataSummary) -> ClientRound:
    work = leaf.work.get(client, ClientWork())

    def test(purpose: str) -> Evaluation:
        splits = leaf.evaluations.get(purpose, {}).get(client)
        return splits["test"] if splits else pool([])

    return ClientRound(
        client=client,
        leaf=leaf.index,
        num_train=data.num_train[client],
        train_loss=work.loss,
        leaf_test=test(records.LEAF),
        cloud_test=test(records.CLOUD),
        global_test=test(records.GLOBAL),
        bytes_up=work.bytes_up,
        bytes_down=work.bytes_down,
        seconds=work.seconds,
    )


def main(
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML file with tool.flwr tables, in place of this project's pyproject.toml; "
            "keys that it leaves out take their defaults."
        ),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="TABLE.KEY=VALUE",
            help="Override a setting, for example --set cloud_cluster.tau=0.8; repeatable.",
        ),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Where the run makes its own results folder."),
    ] = None,
) -> None:
    """Run hierarchical clustered federated learning, in this process or on Ray's actors.

    The environment variable SEED overrides the seed.
    """
    try:
        settings = load_settings(
            config, assignments=assignments or [], output_dir=output_dir, seed=environment_seed()
        )
        console = Console()
        start_logging(console)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # to end as Ctrl-C does
        run(settings, standard_callbacks(console))
    except FedgeError as error:
        typer.echo(f"error: {error}", err=True)
        if isinstance(error, StalledError):  # a thread that hangs would keep the process
            sys.stdout.flush()
            os._exit(error.exit_code)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        typer.echo("stopped; the results of finished rounds are kept", err=True)
        raise typer.Exit(130) from None


def run(settings: Settings, callbacks: Sequence[Callback]) -> Result:
    """Run on the backend that the settings ask for.

    Raises
    ------
    FedgeError
        As :meth:`Orchestrator.run` and :func:`open_grid` do.
    """
    callbacks = list(callbacks)

    def tell(done: Done) -> None:
        if address := records.Address.of(done.reply):
            what = (address.client, address.leaf, address.purpose)
            client_done = ClientDone(*what, done.worker, done.started, done.ended)
            for callback in callbacks:
                callback.on_client_done(client_done)

    def tell_workers(names: Sequence[str]) -> None:
        for callback in callbacks:
            callback.on_workers(names)

    with open_grid(settings, tell, tell_workers) as (grid, settings):
        if settings.runtime.dashboard:
            from fedge_sim.runtime.dashboard import DashboardMetrics

            callbacks.append(DashboardMetrics(grid))
        return Orchestrator(settings, grid, callbacks).run()


if __name__ == "__main__":
    command = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    command.command()(main)
    command()
