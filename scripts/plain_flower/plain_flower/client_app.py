"""The ClientApp: one client for each node, chosen by the node's ``partition-id``."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn
from torch.utils.data import TensorDataset

from plain_flower.networks import NETWORKS
from plain_flower.task import DEVICE, load_data, test
from plain_flower.task import train as fit

torch.set_num_threads(1)  # an actor has one core

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the received model on the client's training examples; send it back if "empty"."""
    if context.run_config["empty"]:
        metrics = MetricRecord({"num-examples": 1})
        return Message(
            RecordDict({"arrays": msg.content["arrays"], "metrics": metrics}), reply_to=msg
        )
    net, (data, _) = _prepare(msg, context)
    loss = fit(net, data, context.run_config)
    content = RecordDict(
        {
            "arrays": ArrayRecord(net.state_dict()),
            "metrics": MetricRecord({"train_loss": loss, "num-examples": len(data)}),
        }
    )
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Evaluate the received model on the client's test examples."""
    net, (_, data) = _prepare(msg, context)
    loss, accuracy = test(net, data, context.run_config)
    metrics = MetricRecord({"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(data)})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)


def _prepare(
    msg: Message, context: Context
) -> tuple[nn.Module, tuple[TensorDataset, TensorDataset]]:
    config = context.run_config
    net = NETWORKS[str(config["model"])](int(config["num-classes"]))
    arrays = msg.content["arrays"]
    assert isinstance(arrays, ArrayRecord)
    net.load_state_dict(arrays.to_torch_state_dict())
    client = int(context.node_config["partition-id"])
    return net.to(DEVICE), load_data(str(config["data-root"]), client)
