"""The workload in a bare PyTorch loop: what a round costs without any framework.

``python bare_loop.py CONFIG FOLDER``, with plain Flower's configuration as JSON. Clients are
shared out among a few processes once, longest first; a process trains its clients one after the
other on one thread, batches gathered from one tensor by their indices. Weights are averaged once
a round, then evaluated on all test examples.
"""

import json
import multiprocessing
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, count, islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from plain_flower.plain_flower.networks import NETWORKS
from stamps import stamp
from torch import Tensor, nn

TEST_SHARE = 0.2  # the last of each client's examples
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Config: TypeAlias = Mapping[str, Any]
Weights: TypeAlias = dict[str, NDArray[Any]]
Examples: TypeAlias = tuple[Tensor, Tensor]  # inputs (n, *shape), classes (n,)


def main(config: Config, folder: Path) -> None:
    """Run all rounds, and stamp them."""
    sizes = np.bincount(np.load(Path(config["data-root"], "client.npy"))).tolist()
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for clients in share_out(sizes, config["processes"]):
        here, there = context.Pipe()
        processes.append(context.Process(target=work, args=(there, config, clients), daemon=True))
        pipes.append(here)
        processes[-1].start()
    torch.manual_seed(0)
    weights = weights_of(NETWORKS[config["model"]](config["num-classes"]))
    for pipe in pipes:
        pipe.recv()  # its data is there
    stamp(folder)
    for number in range(1, config["num-server-rounds"] + 1):
        weights = average(ask(pipes, "train", weights))
        loss, right, examples = np.sum(ask(pipes, "evaluate", weights), axis=0)
        print(f"round {number}: loss {loss / examples:.4f}, accuracy {right / examples:.4f}")
        stamp(folder)
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join()


def share_out(sizes: Sequence[int], processes: int) -> list[list[int]]:
    """Give each client, largest first, to the process that has least to do; return the clients."""
    shares: list[list[int]] = [[] for _ in range(min(processes, len(sizes)))]
    load = [0] * len(shares)
    for client in sorted(range(len(sizes)), key=lambda c: -sizes[c]):
        idlest = load.index(min(load))
        shares[idlest].append(client)
        load[idlest] += sizes[client]
    return shares


def ask(pipes: Sequence[Connection], what: str, weights: Weights) -> list[Any]:
    """Ask all processes for the same, and wait for their answers."""
    for pipe in pipes:
        pipe.send((what, weights))
    return [pipe.recv() for pipe in pipes]


def average(parts: Sequence[tuple[Weights, int]]) -> Weights:
    """Return the mean of all clients' weights, from sums of weights x examples, and examples."""
    total = sum(examples for _, examples in parts)
    return {name: sum(sums[name] for sums, _ in parts) / total for name in parts[0][0]}


# ------------------------------------------------------------------ in a process


def work(pipe: Connection, config: Config, clients: Sequence[int]) -> None:
    """Train and evaluate some clients whenever asked."""
    torch.set_num_threads(1)
    net = NETWORKS[config["model"]](config["num-classes"]).to(DEVICE)
    data = [load(Path(config["data-root"]), client) for client in clients]
    rng = np.random.default_rng(clients[0])
    pipe.send("ready")
    while (message := pipe.recv()) is not None:
        what, weights = message
        if what == "train":
            pipe.send(train_all(net, weights, [train for train, _ in data], config, rng))
            continue
        put(net, weights)
        size = config["eval-batch-size"]
        pipe.send(np.sum([evaluate(net, *test, size) for _, test in data], axis=0))


def load(root: Path, client: int) -> tuple[Examples, Examples]:
    """Return one client's training and test examples, where it trains."""
    rows = np.flatnonzero(np.load(root / "client.npy") == client)
    x = torch.from_numpy(np.load(root / "x.npy", mmap_mode="r")[rows]).to(DEVICE)
    y = torch.from_numpy(np.load(root / "y.npy")[rows]).to(DEVICE)
    n = len(rows) - round(TEST_SHARE * len(rows))
    return (x[:n], y[:n]), (x[n:], y[n:])


def train_all(
    net: nn.Module,
    weights: Weights,
    clients: Sequence[Examples],
    config: Config,
    rng: np.random.Generator,
) -> tuple[Weights, int]:
    """Train clients, each from these weights; return the sum of weights x examples, and those."""
    sums: Weights = {name: np.zeros(array.shape) for name, array in weights.items()}
    for x, y in clients:
        put(net, weights)
        train(net, x, y, config, rng)
        for name, array in weights_of(net).items():
            sums[name] += array * len(x)
    return sums, sum(len(x) for x, _ in clients)


def train(net: nn.Module, x: Tensor, y: Tensor, config: Config, rng: np.random.Generator) -> None:
    """Train in place on one client's examples."""
    criterion = nn.CrossEntropyLoss(label_smoothing=config["label-smoothing"])
    optimizer = torch.optim.SGD(
        net.parameters(),
        lr=config["lr-init"],
        momentum=config["momentum"],
        weight_decay=config["weight-decay"],
        foreach=True,
    )
    net.train()
    for rows in batches(len(x), config, rng):
        optimizer.zero_grad()
        criterion(net(x[rows]), y[rows]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), config["clip-norm"])
        optimizer.step()


def batches(n: int, config: Config, rng: np.random.Generator) -> Iterator[Tensor]:
    """Yield the rows of each batch, in a new order every epoch: of all epochs, or some steps."""
    size, steps = config["batch-size"], config["local-steps"]
    epochs = count() if steps else range(config["local-epochs"])
    orders = (torch.from_numpy(rng.permutation(n)).to(DEVICE) for _ in epochs)
    return islice(chain.from_iterable(order.split(size) for order in orders), steps or None)


@torch.inference_mode()
def evaluate(net: nn.Module, x: Tensor, y: Tensor, size: int) -> tuple[float, int, int]:
    """Return the sum of the losses, right answers, and examples."""
    net.eval()
    loss, right = 0.0, 0
    for x_part, y_part in zip(x.split(size), y.split(size), strict=True):
        logits = net(x_part)
        loss += float(nn.functional.cross_entropy(logits, y_part, reduction="sum"))
        right += int((logits.argmax(dim=1) == y_part).sum())
    return loss, right, len(x)


def weights_of(net: nn.Module) -> Weights:
    """Return copies of a network's parameters and buffers."""
    return {name: t.detach().cpu().numpy().copy() for name, t in net.state_dict().items()}


def put(net: nn.Module, weights: Weights) -> None:
    """Copy weights into a network."""
    net.load_state_dict({name: torch.as_tensor(array) for name, array in weights.items()})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
