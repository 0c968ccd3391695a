"""Random streams, each derived from (seed, purpose, numbers); nothing is seeded globally.

A stream depends on nothing but its name, so a result does not depend on the number of
workers, on the order of replies or on the runtime that carried the messages.
"""

import zlib

import numpy as np
import torch


def stream(seed: int, purpose: str, *indices: int) -> np.random.Generator:
    """Return the random stream named by ``(seed, purpose, *indices)``.

    Parameters
    ----------
    seed : int
        The run's seed, 0 or more.
    purpose : str
        What the numbers are for, for example ``"batches"``.
    *indices : int
        What they belong to, for example round and client, each 0 or more.
    """
    # The number of indices is part of the name: numpy takes [1] and [1, 0] for the same seed.
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), len(indices), *indices])


def torch_generator(seed: int, purpose: str, *indices: int) -> torch.Generator:
    """Return the same kind of stream as a torch generator on the CPU."""
    return torch.Generator().manual_seed(int(stream(seed, purpose, *indices).integers(2**63)))
