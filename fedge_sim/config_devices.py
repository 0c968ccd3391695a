"""The tables of simulated devices, asynchronous rules and FedRevive, typed and checked."""

import math
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from fedge_sim.config_types import (
    Count,
    Fraction,
    NonNegative,
    OptionalPath,
    Positive,
    SecondsOrNever,
    Table,
)

WHOLE = 1e-6  # how far shares may be from adding up to 1
WIDEST = 1e6  # a standard deviation, in means


def _as_list(value: Any) -> Any:
    return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value


def _moves(rate: float) -> float:
    if 0 < rate < 1:
        raise ValueError("must be 0 (no limit), or at least 1 byte a second")
    return rate


# At most a billion: as seconds, 30 years.
NumberOrList = Annotated[
    tuple[Annotated[float, Field(ge=0, le=1e9)], ...],
    Field(strict=False),
    BeforeValidator(_as_list),
]
BytesPerSecond = Annotated[NonNegative, AfterValidator(_moves)]
WholeOrZero = Annotated[int, Field(ge=0, le=2**31 - 1)]


class Delay(Table):
    """A duration in simulated seconds, drawn anew each time; devices may be of several classes.

    ``mean`` and ``std`` have one value for each class, or one for all; ``shares`` are the shares
    of devices, the same for all classes unless given. Uniform is mean +- sqrt(3) std, so that
    ``std`` is its standard deviation; a normal below 0 is drawn as 0; log-normal has this mean
    and standard deviation; constant and exponential have no ``std``. No mean: no delay.
    """

    distribution: Literal["constant", "normal", "uniform", "exponential", "log-normal"] = "normal"
    mean: NumberOrList = ()
    std: NumberOrList = ()
    shares: NumberOrList = ()

    @model_validator(mode="after")
    def _one_value_for_each_class(self) -> Self:
        n = len(self.mean)
        if not n and (self.std or self.shares):
            raise ValueError("has no mean: give one in seconds, or one for each class of devices")
        if len(self.std) not in (0, 1, n):
            raise ValueError(f"std must have {n} values as mean has, or one, not {len(self.std)}")
        if len(self.shares) not in (0, n):
            raise ValueError(f"shares must have {n} values as mean has, not {len(self.shares)}")
        if self.shares and abs(sum(self.shares) - 1) > WHOLE:
            raise ValueError(f"shares must add up to 1, not {sum(self.shares):g}")
        if self.distribution in ("constant", "exponential") and any(self.std):
            raise ValueError(f"std: a delay that is {self.distribution} has none; leave it out")
        if self.distribution == "log-normal" and not all(self.mean):
            raise ValueError("mean must be above 0 for a log-normal delay")
        if self.distribution == "log-normal" and any(
            std > mean * WIDEST for mean, std in zip(self.mean, self.stds, strict=True)
        ):
            raise ValueError("std must be at most a million times mean for a log-normal delay")
        if self.distribution == "uniform" and any(
            std * 3**0.5 > mean * (1 + WHOLE)
            for mean, std in zip(self.mean, self.stds, strict=True)
        ):
            raise ValueError("std must be at most mean / sqrt(3) for a uniform delay: none is < 0")
        return self

    @property
    def stds(self) -> tuple[float, ...]:
        """The standard deviation of each class, in seconds."""
        return (
            self.std if len(self.std) == len(self.mean) else (*self.std, 0.0)[:1] * len(self.mean)
        )


class Bandwidth(Table):
    """Of a link, in bytes a simulated second, each way; 0: no limit."""

    down: BytesPerSecond = 0.0
    up: BytesPerSecond = 0.0


class Availability(Table):
    """How devices come and go: the share that is online, and how long one stays so on average."""

    online: Annotated[float, Field(gt=0, le=1)] = 1.0
    session: Positive = 600.0


class Devices(Table):
    """``[tool.flwr.devices]``: simulated devices, on a virtual clock. Times are simulated seconds.

    With ``devices_per_leaf = 0`` the devices are the clients of the hierarchy; else there are so
    many under each leaf server, and a device's ``subset_size`` examples are drawn when it is used.
    """

    enable: bool = False
    devices_per_leaf: Annotated[int, Field(ge=0, le=10_000_000)] = 0
    subset_size: Annotated[int, Field(ge=3, le=10_000_000)] = 350
    local_iters: WholeOrZero = 0
    device_selection_size: Count = 100
    over_selection: Annotated[float, Field(ge=0, le=1000)] = 0.0
    min_hole_to_fill: Count = 1
    device_reuse: bool = True
    num_updates_for_model: WholeOrZero = 0
    max_model_version: Count = 200
    eval_frequency: Count = 1
    job_timeout: SecondsOrNever = 60.0
    update_timeout: SecondsOrNever = 500.0
    device_speed: Delay = Delay()
    device_speed_per: Literal["job", "step"] = "job"
    communication_delay: Delay = Delay()
    download_delay: Delay = Delay()
    upload_delay: Delay = Delay()
    client_leaf_bandwidth: Bandwidth = Bandwidth()
    leaf_cloud_bandwidth: Bandwidth = Bandwidth()
    availability: Availability = Availability()
    dropout: Fraction = 0.0

    def selected_for(self, wanted: int) -> int:
        """Return how many clients are selected by a round that waits for ``wanted`` of them."""
        return math.ceil(round(wanted * (1 + self.over_selection), 9))  # 1.1 * 100 is 110, not 111


class Asynchronous(Table):
    """``[tool.flwr.asynchronous]``: what a server does with updates, in the order they come.

    ``rule = "fedavg"`` waits for all devices that were selected; the others for
    ``devices.num_updates_for_model`` updates. ``server`` says where the versions are made: at the
    cloud, with leaf servers that only pass messages on, or at each leaf server, and the cloud then
    meets them every ``cloud_interval`` simulated seconds or ``cloud_versions`` versions of all.
    """

    rule: Literal["fedavg", "fedasync", "fedbuff", "downweight", "fedrevive"] = "fedavg"
    server: Literal["cloud", "leaf"] = "cloud"
    cloud_interval: SecondsOrNever = 0.0
    cloud_versions: WholeOrZero = 0
    mixing: Annotated[float, Field(gt=0, le=1)] = 0.6
    staleness: Literal["constant", "polynomial", "hinge"] = "constant"
    staleness_a: Positive = 0.5
    staleness_b: NonNegative = 4.0
    beta: Literal["constant", "linear", "exponential", "stepwise", "cosine", "sqrt"] = "cosine"
    beta_factor: Positive = 75.0

    @field_validator("beta_factor")
    @classmethod
    def _a_constant_beta_is_a_share(cls, factor: float, info: Any) -> float:
        if info.data.get("beta") == "constant" and factor > 1:
            raise ValueError('must be at most 1 with beta = "constant": it is beta itself')
        return factor


class FedRevive(Table):
    """``[tool.flwr.fedrevive]``: distillation from recent client models (arXiv 2511.00655)."""

    variant: Literal["generator", "light"] = "generator"
    unlabelled_data: OptionalPath = ""
    teacher_buffer_size: Annotated[int, Field(ge=1, le=10_000)] = 8
    freeze_versions: WholeOrZero = 50
    warmup_versions: WholeOrZero = 100
    noise_size: Count = 256
    generator_width: Count = 64
    generator_steps: Count = 2
    synthesis_batch_size: Annotated[int, Field(ge=2, le=2**31 - 1)] = 64
    generator_lr: Positive = 0.003
    noise_lr: Positive = 0.001
    one_hot: NonNegative = 1.0
    batch_norm: NonNegative = 0.003
    adversarial: NonNegative = 0.1
    adversarial_start: Count = 100
    class_weight: NonNegative = 0.2
    max_samples: Count = 4096
    kd_steps: Count = 10
    kd_batch_size: Annotated[int, Field(ge=2, le=2**31 - 1)] = 32
    kd_lr: Positive = 0.0001
    temperature: Positive = 1.0
