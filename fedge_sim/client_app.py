"""The Flower ClientApp: trains and evaluates the clients that live on this node.

A message says which client it is for and carries the settings of the run, so a client does
the same wherever it runs. What a node may say itself, in its ``node-config``:
``client-ids="0 3 6"`` (or ``partition-id=3``), the clients that it serves, and ``data-root``,
where its data lies.
"""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, MetricRecord
from flwr.clientapp import ClientApp
from torch import nn

from fedge_sim import records
from fedge_sim.config import Settings, settings_from_json
from fedge_sim.data import FederatedData, federated_data
from fedge_sim.data.base import CPU, DataSummary, Examples
from fedge_sim.errors import FedgeError
from fedge_sim.models import build_model
from fedge_sim.randomness import stream
from fedge_sim.runtime import gpu
from fedge_sim.training import local
from fedge_sim.training.base import ClientTask, TrainSettings, load_arrays, model_arrays
from fedge_sim.training.choice import Choice
from fedge_sim.training.device import device, device_of

app = ClientApp()


@app.query()
def clients_served(message: Message, context: Context) -> Message:
    """Answer which clients this node serves.

    The nodes of Flower's simulation, which have both a ``partition-id`` and
    ``num-partitions``, serve any; so does a node that is told nothing.
    """
    node = context.node_config
    ids: list[int] = []
    if named := "client-ids" in node:
        ids = [int(part) for part in str(node["client-ids"]).replace(",", " ").split()]
    elif "partition-id" in node and "num-partitions" not in node:
        ids = [int(node["partition-id"])]
    answer = ConfigRecord(
        {
            records.SERVES_ANY: not ids and not named,
            records.CLIENT_IDS: ids,
            records.NUM_NODES: int(node.get("num-partitions", 0)),
        }
    )
    return records.reply(message, config=answer)


@app.query("data")
def describe_data(message: Message, context: Context) -> Message:
    """Answer which examples the asked clients hold, and of what form.

    What a user can mend (a missing folder, too few examples) is part of the answer.
    """
    asked = records.config_of(message)
    try:
        data = open_data(_settings(asked, context))
    except FedgeError as error:
        return records.reply(message, config=ConfigRecord({records.ERROR: str(error)}))
    clients = asked[records.CLIENT_IDS]
    answer = records.describe(
        DataSummary(
            clients=tuple(data.clients[client] for client in clients),
            example_shape=data.example_shape,
            classes=data.classes,
            scales=tuple(data.scales[client] for client in clients),
            content=data.dataset.content,
        )
    )
    return records.reply(message, config=answer)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the message's model on its client's training examples."""
    config = records.config_of(message)
    settings, data, model = _prepare(message, context)
    h, client = settings.hierarchy, config[records.CLIENT_ID]
    batch_size, accumulation = gpu.batch_of(settings)
    task = ClientTask(
        start=records.to_arrays(records.arrays_of(message)),
        examples=_examples(settings, data, client, model),
        rows=data.clients[client].train,
        settings=TrainSettings(
            lr=config[records.LR],
            local_epochs=h.local_epochs,
            batch_size=batch_size,
            local_steps=h.local_steps,
            accumulation=accumulation,
            momentum=h.momentum,
            weight_decay=h.weight_decay,
            clip_norm=h.clip_norm,
            label_smoothing=h.label_smoothing,
            prox_mu=h.prox_mu,
        ),
        order=stream(settings.seed, "batches", config[records.ROUND], client),
    )
    [result] = local.Reference(model).train([task])
    metrics = MetricRecord(
        {
            records.NUM_EXAMPLES: len(data.clients[client].train),
            records.LOSS: result.loss,
            records.SECONDS: result.seconds,
        }
    )
    return records.reply(message, arrays=records.to_record(result.arrays), metrics=metrics)


def answer_together(messages: Sequence[Message], context: Context) -> list[Message]:
    """Answer messages of several clients in one vectorised step; the replies are in their order.

    They are all of one type, train or evaluate, and have the same settings; those to evaluate
    also carry the same model and ask for the same splits.
    """
    answer = {MessageType.TRAIN: train, MessageType.EVALUATE: evaluate}
    return [answer[message.metadata.message_type](message, context) for message in messages]


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the message's model on its client's test examples, and training ones if asked."""
    config = records.config_of(message)
    settings, data, model = _prepare(message, context)
    client = config[records.CLIENT_ID]
    examples, own = _examples(settings, data, client, model), data.clients[client]
    metrics = MetricRecord()
    for split in config[records.SPLITS]:
        rows = own.test if split == "test" else own.train
        result = local.evaluate(model, examples, rows, settings.hierarchy.eval_batch_size)
        records.put_evaluation(metrics, split, result)
    return records.reply(message, metrics=metrics)


def open_data(settings: Settings) -> FederatedData:
    """Return the data of a run, which its model suits.

    Raises
    ------
    ConfigError, DataError
        What a user can mend.
    """
    data = federated_data(settings)
    build_model(settings.data.model, data.example_shape, len(data.classes))
    return data


def _settings(config: dict[str, Any], context: Context) -> Settings:
    settings = settings_from_json(config[records.SETTINGS])
    root = context.node_config.get("data-root")
    return settings if root is None else settings.with_data_root(str(root))


def _prepare(message: Message, context: Context) -> tuple[Settings, FederatedData, nn.Module]:
    """Return settings, data and the message's model, and set this thread's compute threads.

    Flower, Ray and torch each choose a number of threads of their own, and the last bits of
    a sum depend on it.
    """
    settings = _settings(records.config_of(message), context)
    torch.set_num_threads(settings.runtime.threads_per_client)
    data = federated_data(settings)
    model = _network(settings, data)
    load_arrays(model, records.to_arrays(records.arrays_of(message)))
    return settings, data, model


class _Kept(threading.local):
    """The network that a thread used last, and of what kind it is."""

    kind: object = None
    network: nn.Module | None = None


_kept = _Kept()


def _network(settings: Settings, data: FederatedData) -> nn.Module:
    """Return a network of arbitrary values where this process trains, the last one if kept."""
    profile = _profile(settings)
    where = device() if profile.gpu_fraction > 0 else CPU
    kind = (settings.data.model, data.example_shape, len(data.classes), where)
    network = _kept.network
    if network is None or kind != _kept.kind or not profile.keep_warm:
        network = build_model(*kind[:3]).to(where)
        _kept.kind, _kept.network = (kind, network) if profile.keep_warm else (None, None)
    return network


def _examples(settings: Settings, data: FederatedData, client: int, model: nn.Module) -> Examples:
    profile = _profile(settings)
    return data.examples(
        client, device_of(model), caching=profile.caching, pipelining=profile.pipelining
    )


def _profile(settings: Settings) -> gpu.Profile:
    """Return the GPU profile as it holds in this process."""
    return gpu.resolve(settings.runtime, torch.cuda.device_count())


def choose(settings: Settings) -> Choice:
    """Return the fastest way to train on this process's device, measured on the run's data."""
    return Choice("reference", compile=False, cohort_size=1, reason="")


def probe(settings: Settings, cohort_size: int = 1) -> None:
    """Train and evaluate the clients with most examples on a few batches, to see what it takes."""
    torch.set_num_threads(settings.runtime.threads_per_client)
    data, h = federated_data(settings), settings.hierarchy
    client = max(range(len(data.clients)), key=lambda c: len(data.clients[c].train))
    rows = data.clients[client].train
    model, (batch_size, _) = _network(settings, data), gpu.batch_of(settings)
    short = TrainSettings(lr=1e-3, local_epochs=1, batch_size=batch_size)
    examples = _examples(settings, data, client, model)
    own = ClientTask({}, examples, rows[: 2 * batch_size], short, stream(0, "probe"))
    local.train(model, own)
    local.evaluate(model, examples, rows[: h.eval_batch_size], h.eval_batch_size)
    records.to_record(model_arrays(model))
