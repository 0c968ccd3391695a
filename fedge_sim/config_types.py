"""What the tables of the settings are made of: values with their bounds, and the base of all."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def _some_are_alike(tau: float) -> float:
    if tau > 1:
        raise ValueError(
            "must be at most 1, as no similarity is more: with 1 only what is equal belongs "
            "together, and with cloud_cluster.enable = false nothing is grouped"
        )
    return tau


def absolute(path: str) -> str:
    """Return a path in full, ``~`` too."""
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError as error:  # ~somebody, who is not known here
        raise ValueError(f"is no path: {error}") from None


Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Seconds = Annotated[float, Field(gt=0, le=3600)]
NonNegative = Annotated[float, Field(ge=0)]
# Of simulated time: a timer of less would never let the clock move on.
SecondsOrNever = Annotated[
    Annotated[float, Field(ge=0, le=0)] | Annotated[float, Field(ge=0.001)],
    Field(description="0 (never), or at least 0.001 seconds"),
]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Similarity = Annotated[NonNegative, AfterValidator(_some_are_alike)]
AbsolutePath = Annotated[str, AfterValidator(absolute)]
OptionalPath = Annotated[str, AfterValidator(lambda path: path and absolute(path))]

# A value, or a word for "found out here" or "as the GPU profile has it". The description is
# what the user is told to be allowed: pydantic reports each side of a union on its own.
AutoCount = Annotated[Literal["auto"] | Count, Field(description='"auto" or an integer from 1')]
AutoCpus = Annotated[Literal["auto"] | Positive, Field(description='"auto" or a number above 0')]
AutoGpus = Annotated[
    Literal["auto"] | Annotated[float, Field(ge=0, le=1)],
    Field(description='"auto" or a number from 0 to 1'),
]
ProfileBatch = Annotated[
    Literal["profile"] | Annotated[int, Field(ge=2, le=2**31 - 1)],
    Field(description='"profile" or an integer from 2 to 2147483647'),
]
ProfileCount = Annotated[
    Literal["profile"] | Count, Field(description='"profile" or an integer from 1')
]
ProfileShare = Annotated[
    Literal["profile"] | Annotated[float, Field(gt=0, le=1)],
    Field(description='"profile" or a number above 0, up to 1'),
]
AutoSwitch = Annotated[Literal["auto"] | bool, Field(description='"auto", true or false')]
ProfileSwitch = Annotated[Literal["profile"] | bool, Field(description='"profile", true or false')]


class Table(BaseModel):
    """Base of all tables: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
