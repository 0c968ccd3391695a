"""The Flower ClientApp: trains and evaluates the clients that live on this node.

A message says which client it is for and carries the settings of the run, so a client does
the same wherever it runs. What a node may say itself, in its ``node-config``:
``client-ids="0 3 6"`` (or ``partition-id=3``), the clients that it serves, and ``data-root``,
where its data lies.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, MetricRecord
from flwr.clientapp import ClientApp

from fedge_sim import records
from fedge_sim.algorithms import Arrays
from fedge_sim.client import (
    autocast_of,
    choose,
    examples_of,
    pooled_examples,
    tools,
    train_settings,
)
from fedge_sim.config import Settings, settings_from_json
from fedge_sim.data import FederatedData, federated_data
from fedge_sim.data.base import DataSummary
from fedge_sim.errors import FedgeError
from fedge_sim.member import Member, keeps_a_model
from fedge_sim.models import build_model
from fedge_sim.randomness import stream
from fedge_sim.training.base import ClientTask, load_arrays
from fedge_sim.training.evaluation import Part, evaluate_together

app = ClientApp()


@app.query()
def clients_served(message: Message, context: Context) -> Message:
    """Answer which clients this node serves.

    The nodes of Flower's simulation, which have both a ``partition-id`` and
    ``num-partitions``, serve any; so does a node that is told nothing. A run begins with this
    question: what clients kept for one before is dropped.
    """
    context.state.clear()
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

    Of devices that draw their examples none is asked for; then the scale of all is in the answer,
    and how many examples are held out.

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
            scales=tuple(data.scales[client] for client in (clients or [0])),
            content=data.dataset.content,
            groups=tuple(data.groups[client] for client in clients) if data.groups else (),
            num_held_out=len(data.held_out),
            sides_given=data.sides_given,
        )
    )
    return records.reply(message, config=answer)


@app.query("training")
def choose_training(message: Message, context: Context) -> Message:
    """Answer which way to train is fastest on this node, one client a message."""
    choice = choose(_settings(records.config_of(message), context), cohorts=False)
    return records.reply(message, config=ConfigRecord(asdict(choice)))


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the message's model on its client's training examples."""
    [reply] = _train([message], context)
    return reply


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the message's model on its client's test examples, and training ones if asked."""
    [reply] = _evaluate([message], context)
    return reply


def answer_together(messages: Sequence[Message], context: Context) -> list[Message]:
    """Answer messages of several clients in one vectorised step; the replies are in their order.

    They are all of one type, train or evaluate, and have the same settings; those to evaluate
    also carry the same model and ask for the same splits.
    """
    together = {MessageType.TRAIN: _train, MessageType.EVALUATE: _evaluate}
    return together[messages[0].metadata.message_type](messages, context)


def _train(messages: Sequence[Message], context: Context) -> list[Message]:
    settings, data = _prepare(messages[0], context)
    kit = tools(settings, data, records.config_of(messages[0])[records.ROUND])
    starts: dict[int, Arrays] = {}  # clients of one leaf server begin with one record
    members, tasks = [], []
    for message in messages:
        config, record = records.config_of(message), records.arrays_of(message)
        if id(record) not in starts:
            starts[id(record)] = records.to_arrays(record)
        client = config[records.CLIENT_ID]
        member = Member(settings, data, context.state, client, kit)
        if settings.hierarchy.client_rule == "centralised":
            examples, rows = pooled_examples(settings, data)
        else:
            examples, rows = examples_of(settings, data, client), data.clients[client].train
        members.append(member)
        tasks.append(
            ClientTask(
                start=member.start(starts[id(record)]),
                examples=examples,
                rows=rows,
                settings=train_settings(settings, config[records.LR], config[records.PROX_MU]),
                order=_order(settings, config),
                correction=member.correction(message),
            )
        )
    return [
        records.reply(
            message,
            variate=member.keep(task, update),
            arrays=member.shared(update.arrays),
            config=ConfigRecord({records.PATH: update.path}),
            metrics=MetricRecord(
                {
                    records.NUM_EXAMPLES: len(task.rows),
                    records.LOSS: update.loss,
                    records.SECONDS: update.seconds,
                    **_class_counts(message, task),
                }
            ),
        )
        for message, member, task, update in zip(
            messages, members, tasks, kit.path.train(tasks), strict=True
        )
    ]


def _order(settings: Settings, config: dict[str, Any]) -> np.random.Generator:
    """Return what draws the order of a client's batches: of a round, or of a device's job."""
    client, job = config[records.CLIENT_ID], config.get(records.JOB)
    if job is None:
        return stream(settings.seed, "batches", config[records.ROUND], client)
    return stream(settings.seed, "batches/job", job, client)


def _class_counts(message: Message, task: ClientTask) -> dict[str, list[int]]:
    """Return a client's training examples of each class, if the message asks for them."""
    if not (classes := records.config_of(message).get(records.CLASS_COUNTS, 0)):
        return {}
    counts = np.bincount(task.examples.y[task.rows], minlength=classes)
    return {records.CLASS_COUNTS: counts.tolist()}


def _evaluate(messages: Sequence[Message], context: Context) -> list[Message]:
    settings, data = _prepare(messages[0], context)
    kit = tools(settings, data)
    if keeps_a_model(settings) and len(messages) > 1:  # each client has another one
        return [reply for message in messages for reply in _evaluate([message], context)]
    config = records.config_of(messages[0])
    splits, client = config[records.SPLITS], config[records.CLIENT_ID]
    member = Member(settings, data, context.state, client, kit)
    given = records.to_arrays(records.arrays_of(messages[0]))
    load_arrays(kit.network, member.used(given, config[records.PURPOSE]))
    parts = []
    for message in messages:
        parts += _parts(settings, data, records.config_of(message))
    results = iter(
        evaluate_together(
            kit.network, parts, settings.hierarchy.eval_batch_size, autocast_of(settings)
        )
    )
    replies = []
    for message in messages:
        metrics = MetricRecord()
        for split in splits:
            records.put_evaluation(metrics, split, next(results))
        replies.append(records.reply(message, metrics=metrics))
    return replies


def _parts(settings: Settings, data: FederatedData, config: dict[str, Any]) -> list[Part]:
    """Return the examples that a message asks to evaluate on, split by split."""
    splits, client = config[records.SPLITS], config[records.CLIENT_ID]
    if splits == [records.HELD_OUT]:  # all devices see them alike
        shard = np.array_split(data.held_out, config[records.SHARDS])[client]
        return [(examples_of(settings, data, 0), shard)]
    own, examples = data.clients[client], examples_of(settings, data, client)
    return [(examples, own.test if split == "test" else own.train) for split in splits]


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


def _prepare(message: Message, context: Context) -> tuple[Settings, FederatedData]:
    """Return settings and data, and set what torch sets for this thread or process.

    Flower, Ray and torch each choose a number of compute threads of their own, and the last
    bits of a sum depend on it.
    """
    settings = _settings(records.config_of(message), context)
    torch.set_num_threads(settings.runtime.threads_per_client)
    return settings, federated_data(settings)
