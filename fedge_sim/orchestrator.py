"""The global-round loop: clients train under leaf servers, the cloud groups the leaves.

``python -m fedge_sim.orchestrator`` runs it in this process or on Ray's actors; ``flwr run .``
runs the same class over Flower's grid (:mod:`fedge_sim.server_app`).
"""

import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from torch import nn

from fedge_sim import checkpoint, cloud, records
from fedge_sim.algorithms.fedprox import proximal_mu
from fedge_sim.algorithms.personal import personal_names
from fedge_sim.checkpoint import Checkpoints
from fedge_sim.client import initial_model
from fedge_sim.cloud import CloudState
from fedge_sim.config import Settings, environment_seed, load_settings
from fedge_sim.data.base import DataSummary
from fedge_sim.device_run import DeviceRun, steps_of_a_client
from fedge_sim.earlier import upgrade
from fedge_sim.errors import CheckpointError, ConfigError, FedgeError, StalledError
from fedge_sim.leaf import ClientWork, Gate, LeafServer
from fedge_sim.leaf_strategy import LeafRule
from fedge_sim.member import is_stateful
from fedge_sim.memory import frozen
from fedge_sim.randomness import stream
from fedge_sim.reporting import callbacks_of, start_logging
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
from fedge_sim.runtime.device_pool import DevicePool, seconds_of
from fedge_sim.runtime.node import Done, LocalGrid
from fedge_sim.runtime.roster import call_roster, settle_training, survey, survey_again
from fedge_sim.runtime.state import StateFile
from fedge_sim.runtime.turns import send_in_turn
from fedge_sim.training.base import model_arrays
from fedge_sim.training.local import Evaluation, pool
from fedge_sim.unread import told, unread

if TYPE_CHECKING:
    from flwr.app import Message
    from flwr.serverapp import Grid

log = logging.getLogger("fedge_sim.orchestrator")  # also where it is run as __main__


@dataclass(frozen=True)
class Result:
    """How a run ended: its results folder, and the record of its last round if it has rounds."""

    folder: Path
    last: RoundRecord | None = None


class Orchestrator:
    """Runs the whole hierarchy over a grid.

    Parameters
    ----------
    settings : Settings
    grid : Grid
        Carries the messages: Flower's, or one of :mod:`fedge_sim.runtime`.
    callbacks : sequence of Callback
        Told of the run's start, of every global round, of its end; in this order.
    folder : Path, optional
        The results folder of a run to resume from its checkpoint; none: a new run.
    """

    def __init__(
        self,
        settings: Settings,
        grid: "Grid",
        callbacks: Sequence[Callback] = (),
        folder: Path | None = None,
    ) -> None:
        self.settings = settings
        self.grid = grid
        self.callbacks = callbacks
        self._resumed = folder
        self._accuracies: list[float] = []
        self._client_state: StateFile | None = None
        self._pool: DevicePool | None = None  # where there is a virtual clock
        self._now = 0.0  # simulated seconds

    def run(self) -> Result:
        """Run all global rounds, into a results folder of its own.

        Raises
        ------
        FedgeError
            If settings and data do not fit, a client has no node, or a round cannot go on.
        """
        h = self.settings.hierarchy
        roster = call_roster(self.grid, h.num_clients, self.settings.runtime.node_timeout_s)
        self._roster = roster
        asked = self.settings.app
        if self._resumed is None:
            data = survey(self.grid, roster, self.settings)
        else:
            self.settings, data = survey_again(self.grid, roster, self.settings, self._resumed)
        self.settings = settle_training(self.grid, roster, self.settings)
        model = initial_model(self.settings, data.example_shape, len(data.classes))
        trainable = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
        state = cloud.initial_state(model_arrays(model), h.num_servers)
        leaves = self._leaf_servers(model, roster, data)
        folder = new_results_folder(self.settings) if self._resumed is None else self._resumed
        with checkpoint.at_work(folder):
            settings = self.settings.model_copy(update={"app": asked})
            self._checkpoints = Checkpoints(folder, settings, data.content, data.clients)
            if self._resumed is None:
                self._keep_client_state(folder, None)
            else:
                state = self._restore(folder, leaves)
                log.info("resumed after round %d of %d", state.global_round, h.global_rounds)
            done = tuple(self._accuracies)
            info = RunInfo(settings, folder, data, sum(trainable.values()), done)
            return Result(folder, self._rounds(info, state, leaves))

    def _rounds(
        self, info: RunInfo, state: CloudState, leaves: Sequence[LeafServer]
    ) -> RoundRecord:
        """Do the rounds that are left, and tell the callbacks; return the last one's record."""
        rounds, reason = self.settings.hierarchy.global_rounds, ""
        try:
            for callback in self.callbacks:
                callback.on_run_start(info)
            while state.global_round < rounds and not reason:
                state, record = self._global_round(state, leaves, info.data)
                self._accuracies.append(record.mean_client_accuracy)
                reasons = [callback.on_round_end(record) for callback in self.callbacks]
                reason = next(filter(None, reasons), "")
                self._save(state, leaves, ended=bool(reason))
            if reason:
                log.info("ended after round %d: %s", state.global_round, reason)
            for callback in self.callbacks:
                callback.on_run_end(record)
        finally:
            for callback in self.callbacks:
                callback.close()
            if self._client_state is not None:
                self._client_state.close()
        return record

    def _leaf_servers(
        self, model: nn.Module, roster: Mapping[int, int], data: DataSummary
    ) -> list[LeafServer]:
        h = self.settings.hierarchy
        check_network(self.settings, model)
        personal = personal_names(h.client_rule, model)
        parameters = {n: p.detach().numpy() for n, p in model.named_parameters() if p.requires_grad}
        variate = {n: np.zeros_like(p) for n, p in parameters.items()}
        variate = variate if h.client_rule == "scaffold" else {}
        first = model_arrays(model)
        sent = {n: a for n, a in first.items() if n not in personal}
        # SCAFFOLD's variates travel between clients and leaf servers, and no further.
        size, also = (records.to_record(arrays).count_bytes() for arrays in (sent, variate))
        if self.settings.devices.enable:
            steps = partial(steps_of_a_client, self.settings, data)
            self._pool = DevicePool(self.settings, size + also, size + also, steps)
        link = self.settings.devices.leaf_cloud_bandwidth
        self._trip = seconds_of(size, link.down), seconds_of(size, link.up)
        return [
            LeafServer(
                *(index, clients, roster, self.settings, parameters.keys(), data, personal),
                rule=LeafRule(h, parameters.keys()) if h.leaf_strategy else None,
                variate=variate,
                pool=self._pool,
                model=first,
                started_from=first,
            )
            for index, clients in enumerate(h.leaf_clients)
        ]

    # ------------------------------------------------------------------ saving and resuming

    def _keep_client_state(self, folder: Path, saved: Mapping[str, Any] | None) -> None:
        """Let our own grids keep what clients remember; Flower's nodes do it themselves."""
        if is_stateful(self.settings) and isinstance(self.grid, LocalGrid):
            num_clients = self.settings.hierarchy.num_clients
            self._client_state = StateFile(folder / "state", num_clients, saved)
            self.grid.keep_state(self._client_state)

    def _save(self, state: CloudState, leaves: Sequence[LeafServer], *, ended: bool) -> None:
        """Write the checkpoint of a round that is done, in the place of the one before.

        None where Flower's nodes keep what clients remember: it ends with the run.
        """
        h, kept = self.settings.hierarchy, self._client_state
        if is_stateful(self.settings) and kept is None:
            return
        flat_round = state.global_round * h.server_rounds_per_global
        tree: dict[str, Any] = {
            "accuracies": self._accuracies,
            "now": self._now,
            "pool": {} if self._pool is None else self._pool.state(),
            "cloud": vars(state),
            "leaves": [leaf.state() for leaf in leaves],
            "states": None if kept is None else kept.state(flat_round),
        }
        self._checkpoints.save(tree, ended=ended or state.global_round == h.global_rounds)
        if kept is not None:
            kept.commit(flat_round)

    def _restore(self, folder: Path, leaves: Sequence[LeafServer]) -> CloudState:
        """Go back to a run's checkpoint; rows of the round that was under way are dropped."""
        tree = self._checkpoints.restore()
        self._keep_client_state(folder, tree["states"])
        for leaf, saved in zip(leaves, tree["leaves"], strict=True):
            leaf.restore(saved)
        self._accuracies, self._now = tree["accuracies"], tree["now"]
        if self._pool is not None:
            self._pool.restore(tree["pool"])
        self._checkpoints.cut_back(tree)
        return CloudState(**tree["cloud"])

    # ------------------------------------------------------------------ a round

    def _global_round(
        self, state: CloudState, leaves: Sequence[LeafServer], data: DataSummary
    ) -> tuple[CloudState, RoundRecord]:
        """Train under every leaf, do the cloud's step, evaluate what came of it."""
        started = time.perf_counter()
        h = self.settings.hierarchy
        global_round = state.global_round + 1
        lr = h.learning_rate(global_round)
        mu = proximal_mu(self._accuracies, h)
        down, up = self._trip
        present = self._present(global_round)
        drawn = [leaves[index] for index in present]
        gates = {leaf.index: leaf.sit_out() for leaf in leaves}
        for leaf in drawn:
            gates[leaf.index] = leaf.begin(state.model_for(leaf.index), self._now + down)
        for server_round in range(1, h.server_rounds_per_global + 1):
            flat_round = state.global_round * h.server_rounds_per_global + server_round
            self._train(drawn, flat_round, lr, mu)
        state = cloud.step(
            state,
            [leaf.model for leaf in leaves],
            [1 if h.averaging == "uniform" else leaf.num_examples for leaf in leaves],
            self.settings.cloud_cluster,
            global_lr=h.global_lr,
            trainable=leaves[0].trainable,
            started_from=[leaf.started_from for leaf in leaves],
            present=present,
        )
        self._now = max(leaf.now for leaf in drawn) + up
        self._evaluate(leaves, state)
        record = RoundRecord(
            global_round=global_round,
            lr=lr,
            leaves=tuple(_leaf_round(leaf, state, gates[leaf.index], data) for leaf in leaves),
            central_train=pool(leaf.pooled(records.GLOBAL, "train") for leaf in leaves),
            central_test=pool(leaf.pooled(records.GLOBAL) for leaf in leaves),
            cloud=state,
            seconds=time.perf_counter() - started,
            simulated_seconds=self._now if self.settings.devices.enable else math.nan,
        )
        return state, record

    def _present(self, global_round: int) -> Sequence[int]:
        """Return the leaf servers that take part in a round: all, or in CFL of clients a share."""
        servers = self.settings.hierarchy.num_servers
        if not self.settings.draws_leaf_servers:
            return range(servers)
        draw = stream(self.settings.seed, "participation of leaf servers", global_round)
        return sorted(draw.choice(servers, self.settings.num_training, replace=False).tolist())

    def _train(
        self, leaves: Sequence[LeafServer], flat_round: int, lr: float, prox_mu: float
    ) -> None:
        """Do one server round at all leaves: one barrier, so that no core waits for a leaf."""
        self._roster.look_for_new_nodes(self.grid)
        config = records.train_config(self.settings, lr, prox_mu)
        messages = [
            message
            for leaf in leaves
            for message in leaf.configure_train(
                flat_round, records.to_record(leaf.model), config, self.grid
            )
        ]
        replies = self._exchange(messages, in_turn=is_stateful(self.settings))
        for leaf in leaves:
            leaf.aggregate_train(flat_round, replies.get((records.TRAIN, leaf.index), []))

    def _evaluate(self, leaves: Sequence[LeafServer], state: CloudState) -> None:
        """Evaluate, at every client, its leaf's model, the cloud's for it, and the global one.

        With one cluster the last two are the same model, which is evaluated once. Where clients
        have a personal model beside it (pFedMe), that is evaluated, too.
        """
        self._roster.look_for_new_nodes(self.grid)
        cloud_models = [records.to_record(model) for model in state.cluster_models]
        one_cluster = len(cloud_models) == 1
        plans = [(records.LEAF, ["test"]), (records.CLOUD, ["test", "train"])]
        if not one_cluster:
            plans += [(records.GLOBAL, ["test", "train"])]
        if self.settings.hierarchy.client_rule == "pfedme":
            plans += [(records.PERSONAL, ["test", "train"])]
        configs = {p: records.evaluate_config(self.settings, p, splits) for p, splits in plans}
        global_model = cloud_models[0] if one_cluster else records.to_record(state.global_model)
        messages = []
        for leaf in leaves:
            models = {
                records.LEAF: records.to_record(leaf.model),
                records.CLOUD: cloud_models[state.labels[leaf.index]],
                records.GLOBAL: global_model,
            }
            models[records.PERSONAL] = models[records.CLOUD]  # who has not trained has no other
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

    def _exchange(
        self, messages: "list[Message]", in_turn: bool = False
    ) -> "dict[tuple[str, int], list[Message]]":
        """Send messages, wait for the replies, and sort them by purpose and leaf.

        Flower's nodes take their clients in turn if these have a state that would be lost.
        """
        # Most work first, so that no core is left waiting for a large client that began last.
        messages.sort(key=lambda message: -records.work_of(message))
        sorted_replies: dict[tuple[str, int], list[Message]] = {}
        one_by_one = in_turn and not isinstance(self.grid, LocalGrid)
        send = partial(send_in_turn, self.grid) if one_by_one else self.grid.send_and_receive
        for reply in send(messages):
            if address := records.Address.of(reply):
                sorted_replies.setdefault((address.purpose, address.leaf), []).append(reply)
        return sorted_replies


def _leaf_round(leaf: LeafServer, state: CloudState, gate: Gate, data: DataSummary) -> LeafRound:
    return LeafRound(
        leaf=leaf.index,
        cluster=state.labels[leaf.index],
        gate=gate,
        leaf_test=leaf.pooled(records.LEAF),
        cloud_test=leaf.pooled(records.CLOUD),
        clients=tuple(_client_round(leaf, client, data) for client in leaf.clients),
    )


def _client_round(leaf: LeafServer, client: int, data: DataSummary) -> ClientRound:
    work = leaf.work.get(client, ClientWork())

    def result(purpose: str, split: str = "test") -> Evaluation:
        splits = leaf.evaluations.get(purpose, {}).get(client)
        return splits[split] if splits else pool([])

    own = records.PERSONAL if records.PERSONAL in leaf.evaluations else records.CLOUD

    return ClientRound(
        client=client,
        leaf=leaf.index,
        num_train=data.num_train[client],
        train_loss=work.loss,
        leaf_test=result(records.LEAF),
        cloud_test=result(records.CLOUD),
        global_test=result(records.GLOBAL),
        own_test=result(own),
        own_train=result(own, "train"),
        bytes_up=work.bytes_up,
        bytes_down=work.bytes_down,
        seconds=work.seconds,
        simulated_seconds=work.simulated_seconds,
        fate=work.fate,
        lost=work.lost,
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
    resume_folder: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            help="The results folder of a run that was stopped: go on after its last finished "
            "round, with its own settings.",
        ),
    ] = None,
) -> None:
    """Run hierarchical clustered federated learning, in this process or on Ray's actors.

    The environment variable SEED overrides the seed.
    """
    try:
        console = Console()
        if resume_folder is not None and (config or assignments or output_dir):
            raise ConfigError("--resume takes the run's own settings: no other option goes with it")
        start_logging(console)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # to end as Ctrl-C does
        if resume_folder is not None:
            resume(resume_folder, lambda settings: callbacks_of(settings, console))
            return
        settings = load_settings(
            config, assignments=assignments or [], output_dir=output_dir, seed=environment_seed()
        )
        if without_effect := told(unread(settings)):
            log.warning(without_effect)
        run(settings, callbacks_of(settings, console))
    except FedgeError as error:
        typer.echo(f"error: {error}", err=True)
        if isinstance(error, StalledError):  # a thread that hangs would keep the process
            sys.stdout.flush()
            os._exit(error.exit_code)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        typer.echo(
            "stopped; what is finished is kept: go on with --resume and the results folder",
            err=True,
        )
        raise typer.Exit(130) from None


def check_strategy(settings: Settings) -> None:
    """Raise ConfigError if ``leaf_strategy`` is none that a leaf server can use."""
    if settings.hierarchy.leaf_strategy:
        LeafRule(settings.hierarchy, frozenset())


def check_network(settings: Settings, model: nn.Module) -> None:
    """Raise ConfigError if the network has not what the client rule is about."""
    rule = settings.hierarchy.client_rule
    if rule == "fedbn" and not personal_names(rule, model):
        name = settings.data.model
        problem = f"keeps BatchNorm layers with the clients, and model {name!r} has none"
        raise ConfigError.at("hierarchy", "client_rule", rule, problem)


def resume(folder: Path, callbacks: Callable[[Settings], Sequence[Callback]]) -> Result:
    """Go on with a run that was stopped, after its last finished round.

    Parameters
    ----------
    folder : Path
        Its results folder.
    callbacks : callable
        From the run's settings to its callbacks.

    Raises
    ------
    FedgeError
        If there is nothing to resume, and as :func:`run` does.
    """
    file = folder if folder.name == checkpoint.NAME else folder / checkpoint.NAME
    if not file.is_file():
        raise ConfigError(
            f"{folder}: is no results folder of a run that has finished a round (there is no "
            f"{checkpoint.NAME})"
        )
    folder = file.parent
    with checkpoint.at_work(folder):
        upgrade(folder)
    tree = checkpoint.load(file, arrays=False)
    if tree["ended"]:
        raise CheckpointError(f"{folder}: the run is finished, there is nothing to resume")
    settings = checkpoint.settings_to_go_on_with(folder, tree)
    if settings.data.partition == "file" and (kept := folder / "partition.json").exists():
        settings = settings.with_data(partition_file=str(kept.resolve()))
    return run(settings, callbacks(settings), folder)


def run(settings: Settings, callbacks: Sequence[Callback], folder: Path | None = None) -> Result:
    """Run on the backend that the settings ask for; with a results folder, resume its run.

    Raises
    ------
    FedgeError
        As :meth:`Orchestrator.run` and :func:`open_grid` do.
    """
    callbacks = list(callbacks)
    check_strategy(settings)  # before anything starts

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
        return conduct(settings, grid, callbacks, folder)


def conduct(
    settings: Settings, grid: "Grid", callbacks: Sequence[Callback], folder: Path | None = None
) -> Result:
    """Run rounds of all clients over a grid, or versions of devices, as the settings have it."""
    # What is imported stays: no pass of the collector need look at it. Flower's QFedAvg and Bulyan
    # ask for a pass once for each client.
    with frozen():
        if settings.by_versions:
            return Result(DeviceRun(settings, grid, callbacks, folder).run())
        return Orchestrator(settings, grid, callbacks, folder).run()


if __name__ == "__main__":
    command = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    command.command()(main)
    command()
