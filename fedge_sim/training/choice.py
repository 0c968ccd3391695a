"""Which way to train is fastest here: measured, not assumed."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Choice:
    """The way to train that a run takes.

    Attributes
    ----------
    training : {"reference", "single", "cohort"}
    compile : bool
        Whether steps are compiled, in the way "single".
    cohort_size : int
        Clients of one vectorised step that train most clients a second; 1 without cohorts.
    reason : str
        For the log: what was measured.
    """

    training: Literal["reference", "single", "cohort"]
    compile: bool
    cohort_size: int
    reason: str
