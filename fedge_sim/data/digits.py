"""scikit-learn's own handwritten digits: 1,797 images (1, 8, 8), 10 classes, no download."""

from typing import Any

from fedge_sim.config import AppConfig
from fedge_sim.data.base import Names
from fedge_sim.data.store import Recipe, StoreWriter


def recipe(_config: AppConfig) -> Recipe:
    """Say how the digits become a store; nothing needs to be set."""
    return Recipe("digits", {}, (), _write)


def _write(writer: StoreWriter) -> tuple[Names, dict[str, Any]]:
    from sklearn.datasets import load_digits  # takes a second, which only this dataset needs

    digits = load_digits()
    writer.add(digits.images[:, None], digits.target)
    return Names(tuple(str(name) for name in digits.target_names)), {}
