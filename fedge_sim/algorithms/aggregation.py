"""The one weighted mean, used at the leaf servers and at the cloud."""

from collections.abc import Sequence, Set

import numpy as np

from fedge_sim.algorithms import Arrays
from fedge_sim.models.tracker import forget_tracked


def weighted_mean(models: Sequence[Arrays], weights: Sequence[float]) -> Arrays:
    """Average models by weight: sum_i w_i x_i / sum_i w_i (McMahan et al. 2017, alg. 1).

    Parameters
    ----------
    models : sequence of Arrays
        Models with the same names and shapes. They are added in the order given, in
        float64, and the mean has each array's own type.
    weights : sequence of float
        A weight for each model, at least 0 and not all 0.

    Returns
    -------
    Arrays
        Integer arrays (BatchNorm's step counter) are those of the model with the largest
        weight, the first of them if several have it; trackers are as new.
    """
    if len(models) != len(weights) or not models:
        raise ValueError(f"{len(models)} models and {len(weights)} weights: need as many, not 0")
    total = float(sum(weights))
    if not total > 0 or min(weights) < 0:
        raise ValueError(f"weights must be at least 0 and not all 0, got {list(weights)}")
    largest = models[int(np.argmax(weights))]
    mean = {}
    for name, array in largest.items():
        if np.issubdtype(array.dtype, np.floating):
            terms = (m[name].astype(np.float64) * w for m, w in zip(models, weights, strict=True))
            # asarray: arithmetic turns an array without axes into a scalar
            mean[name] = np.asarray(sum(terms) / total, dtype=array.dtype)
        else:
            mean[name] = array.copy()
    return forget_tracked(mean)


def step_towards(start: Arrays, mean: Arrays, lr: float, trainable: Set[str]) -> Arrays:
    """Move from ``start`` towards ``mean`` by a server's learning rate: x + lr (mean - x).

    Only trainable arrays are scaled; buffers (BatchNorm's statistics) become the mean's, as
    a rate above 1 could make a variance negative. At ``lr == 1`` this is ``mean`` itself.
    """
    if lr == 1.0:
        return mean
    return {
        name: np.asarray(start[name] + lr * (array - start[name]), dtype=array.dtype)
        if name in trainable
        else array
        for name, array in mean.items()
    }
