"""The Flower ClientApp: trains and evaluates the clients that live on this node.

A message says which client it is for and carries the settings of the run, so a client does
the same wherever it runs. What a node may say itself, in its ``node-config``:
``client-ids="0 3 6"`` (or ``partition-id=3``), the clients that it serves, and ``data-root``,
where its data lies.
"""

from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp
from torch import nn

from fedge_sim import records
from fedge_sim.config import Settings, settings_from_json
from fedge_sim.data import FederatedData, federated_data
from fedge_sim.data.base import DataSummary
from fedge_sim.errors import FedgeError
from fedge_sim.models import build_model
from fedge_sim.randomness import stream
from fedge_sim.training import local

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
        settings = _settings(asked, context)
        data = federated_data(settings)
        build_model(settings.data.model, data.example_shape, len(data.classes))
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
    result = local.train(
        model,
        data.examples(client),
        data.clients[client].train,
        local.TrainSettings(
            lr=config[records.LR],
            local_epochs=h.local_epochs,
            batch_size=h.batch_size,
            momentum=h.momentum,
            weight_decay=h.weight_decay,
            clip_norm=h.clip_norm,
            label_smoothing=h.label_smoothing,
            prox_mu=h.prox_mu,
        ),
        stream(settings.seed, "batches", config[records.ROUND], client),
    )
    metrics = MetricRecord(
        {
            records.NUM_EXAMPLES: len(data.clients[client].train),
            records.LOSS: result.loss,
            records.SECONDS: result.seconds,
        }
    )
    arrays = records.to_record(records.model_arrays(model))
    return records.reply(message, arrays=arrays, metrics=metrics)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the message's model on its client's test examples, and training ones if asked."""
    config = records.config_of(message)
    settings, data, model = _prepare(message, context)
    client = config[records.CLIENT_ID]
    examples, own = data.examples(client), data.clients[client]
    metrics = MetricRecord()
    for split in config[records.SPLITS]:
        rows = own.test if split == "test" else own.train
        result = local.evaluate(model, examples, rows, settings.hierarchy.eval_batch_size)
        records.put_evaluation(metrics, split, result)
    return records.reply(message, metrics=metrics)


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
    model = build_model(settings.data.model, data.example_shape, len(data.classes))
    records.load_arrays(model, records.to_arrays(records.arrays_of(message)))
    return settings, data, model
