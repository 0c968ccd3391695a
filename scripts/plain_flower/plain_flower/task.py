"""The model, a client's data, its training and its evaluation: ordinary PyTorch."""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from flwr.app import UserConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

TEST_SHARE = 0.2


class Net(nn.Module):
    """Conv 6->64, BatchNorm, ReLU, Conv 64->64, BatchNorm, ReLU, mean over time, Linear."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(6, 64, kernel_size=5, padding=2),
            nn.BatchNorm1d(64),
            nn.ReLU(),
            nn.Conv1d(64, 64, kernel_size=5, padding=2),
            nn.BatchNorm1d(64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, num_classes)

    def forward(self, x_BCT: Tensor) -> Tensor:
        """Return the logits (B, num_classes)."""
        logits: Tensor = self.head(self.features(x_BCT).mean(dim=2))
        return logits


@cache  # an actor serves a client again in every round
def load_data(root: str, client: int) -> tuple[TensorDataset, TensorDataset]:
    """Return one client's training and test windows; the last 20 % are held out."""
    rows = np.flatnonzero(np.load(Path(root, "client.npy")) == client)
    x = torch.from_numpy(np.load(Path(root, "x.npy"), mmap_mode="r")[rows])
    y = torch.from_numpy(np.load(Path(root, "y.npy"))[rows])
    num_train = len(rows) - round(TEST_SHARE * len(rows))
    return (
        TensorDataset(x[:num_train], y[:num_train]),
        TensorDataset(x[num_train:], y[num_train:]),
    )


def train(net: nn.Module, data: TensorDataset, config: UserConfig) -> float:
    """Train in place for some epochs; return the mean loss of a step."""
    loader = DataLoader(data, batch_size=int(config["batch-size"]), shuffle=True)
    criterion = nn.CrossEntropyLoss(label_smoothing=float(config["label-smoothing"]))
    optimizer = torch.optim.SGD(
        net.parameters(),
        lr=float(config["lr-init"]),
        momentum=float(config["momentum"]),
        weight_decay=float(config["weight-decay"]),
    )
    epochs = int(config["local-epochs"])
    clip_norm = float(config["clip-norm"])
    net.train()
    running_loss = torch.zeros(())
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(net(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), clip_norm)
            optimizer.step()
            running_loss += loss.detach()
    return float(running_loss) / (epochs * len(loader))


@torch.inference_mode()
def test(net: nn.Module, data: TensorDataset, config: UserConfig) -> tuple[float, float]:
    """Return mean loss and accuracy on some windows."""
    loader = DataLoader(data, batch_size=int(config["eval-batch-size"]))
    criterion = nn.CrossEntropyLoss(reduction="sum")
    net.eval()
    loss, correct = 0.0, 0
    for x, y in loader:
        logits = net(x)
        loss += criterion(logits, y).item()
        correct += int((logits.argmax(dim=1) == y).sum())
    return loss / len(data), correct / len(data)
