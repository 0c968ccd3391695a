"""A client's data, its training and its evaluation: ordinary PyTorch."""

from collections.abc import Iterator
from functools import cache
from itertools import chain, islice, repeat
from pathlib import Path

import numpy as np
import torch
from flwr.app import UserConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

TEST_SHARE = 0.2
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache  # an actor serves a client again in every round
def load_data(root: str, client: int) -> tuple[TensorDataset, TensorDataset]:
    """Return one client's training and test examples; the last 20 % are held out."""
    rows = np.flatnonzero(np.load(Path(root, "client.npy")) == client)
    x = torch.from_numpy(np.load(Path(root, "x.npy"), mmap_mode="r")[rows])
    y = torch.from_numpy(np.load(Path(root, "y.npy"))[rows])
    num_train = len(rows) - round(TEST_SHARE * len(rows))
    return (
        TensorDataset(x[:num_train], y[:num_train]),
        TensorDataset(x[num_train:], y[num_train:]),
    )


def train(net: nn.Module, data: TensorDataset, config: UserConfig) -> float:
    """Train in place, for some epochs or steps; return the mean loss of a step."""
    loader = DataLoader(data, batch_size=int(config["batch-size"]), shuffle=True)
    criterion = nn.CrossEntropyLoss(label_smoothing=float(config["label-smoothing"]))
    optimizer = torch.optim.SGD(
        net.parameters(),
        lr=float(config["lr-init"]),
        momentum=float(config["momentum"]),
        weight_decay=float(config["weight-decay"]),
    )
    clip_norm = float(config["clip-norm"])
    net.train()
    running_loss, steps = torch.zeros((), device=DEVICE), 0
    for x, y in batches(loader, int(config["local-epochs"]), int(config["local-steps"])):
        optimizer.zero_grad()
        loss = criterion(net(x.to(DEVICE)), y.to(DEVICE))
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), clip_norm)
        optimizer.step()
        running_loss += loss.detach()
        steps += 1
    return float(running_loss) / steps


def batches(
    loader: DataLoader[tuple[Tensor, ...]], epochs: int, steps: int
) -> Iterator[tuple[Tensor, ...]]:
    """Return the batches of some epochs, or of so many steps, however many epochs they are."""
    passes = repeat(loader) if steps else repeat(loader, epochs)
    return islice(chain.from_iterable(passes), steps or None)


@torch.inference_mode()
def test(net: nn.Module, data: TensorDataset, config: UserConfig) -> tuple[float, float]:
    """Return mean loss and accuracy on some examples."""
    loader = DataLoader(data, batch_size=int(config["eval-batch-size"]))
    criterion = nn.CrossEntropyLoss(reduction="sum")
    net.eval()
    loss, correct = 0.0, 0
    for batch in loader:
        x, y = (part.to(DEVICE) for part in batch)
        logits = net(x)
        loss += criterion(logits, y).item()
        correct += int((logits.argmax(dim=1) == y).sum())
    return loss / len(data), correct / len(data)
