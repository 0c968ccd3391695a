"""Pure functions from arrays to arrays; nothing here knows Flower or Ray."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

# A model's values by name, as PyTorch names them: parameters and buffers alike.
Arrays = Mapping[str, NDArray[Any]]
FloatArray = NDArray[np.floating[Any]]
