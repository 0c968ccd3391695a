"""GPU profiles: how boldly actors use a GPU, and what that means where there is none."""

from dataclasses import asdict, dataclass, replace
from typing import Literal

from fedge_sim.config import Runtime, Settings

CPU_MEMORY_SHARE = 0.8  # largest share of the host's memory, unless memory_share is set


@dataclass(frozen=True)
class Profile:
    """How actors use the device that they train on.

    Attributes
    ----------
    gpu_fraction : float
        Of a GPU that an actor asks Ray for; 0: it trains on the CPU.
    batch_size, accumulation : int
        Taken only where the settings say ``"profile"``: see :func:`batch_of`.
    memory_share : float
        Of the memory of all GPUs (of the host, where actors train on the CPU) that all actors
        together may use.
    memory_cleanup : {"round", "end", "never"}
        When unused memory is given back: after every round, at the end of the run, never.
    caching : bool
        Whether an actor keeps the dataset on its GPU.
    memory_pool : bool
        Whether torch's allocator grows one pool of GPU memory (``expandable_segments``).
    streams : int
        Cohorts that an actor works on side by side, each on its CUDA stream, at most.
    pipelining : bool
        Whether batches go to the GPU while it computes.
    keep_warm : bool
        Whether networks are kept from one client and round to the next.
    """

    gpu_fraction: float
    batch_size: int
    accumulation: int
    memory_share: float
    memory_cleanup: Literal["round", "end", "never"]
    caching: bool
    memory_pool: bool
    streams: int
    pipelining: bool
    keep_warm: bool


PROFILES = {
    "conservative": Profile(
        gpu_fraction=0.5,
        batch_size=32,
        accumulation=1,
        memory_share=0.5,
        memory_cleanup="round",
        caching=False,
        memory_pool=False,
        streams=1,
        pipelining=False,
        keep_warm=False,
    ),
    "high": Profile(
        gpu_fraction=0.9,
        batch_size=64,
        accumulation=1,
        memory_share=0.95,
        memory_cleanup="end",
        caching=True,
        memory_pool=True,
        streams=1,
        pipelining=True,
        keep_warm=False,
    ),
    "aggressive": Profile(
        gpu_fraction=0.95,
        batch_size=128,
        accumulation=2,
        memory_share=0.95,
        memory_cleanup="never",
        caching=True,
        memory_pool=True,
        streams=4,
        pipelining=True,
        keep_warm=True,
    ),
}

# Settings that have a meaning without a GPU, too.
_SINGLE = ("memory_share", "memory_cleanup", "keep_warm")
_SINGLE_ON_GPU = ("caching", "memory_pool", "streams", "pipelining")


def resolve(runtime: Runtime, gpus: int) -> Profile:
    """Return the profile of the settings, as it holds on a machine with ``gpus`` GPUs.

    Without one, or with ``num_gpus_per_actor = 0``, what only a GPU has is off, and networks are
    kept: it is a GPU's memory that they are not to take. Batch size and accumulation stay the
    profile's: the mathematics must not depend on the machine.
    """
    profile = PROFILES[runtime.gpu_profile]
    if runtime.num_gpus_per_actor != "auto":
        profile = replace(profile, gpu_fraction=runtime.num_gpus_per_actor)
    keys: tuple[str, ...] = _SINGLE + _SINGLE_ON_GPU
    if gpus == 0 or profile.gpu_fraction == 0:
        keys = _SINGLE
        profile = replace(
            profile,
            gpu_fraction=0.0,
            memory_share=min(profile.memory_share, CPU_MEMORY_SHARE),
            caching=False,
            memory_pool=False,
            streams=1,
            pipelining=False,
            keep_warm=True,
        )
    chosen = {key: getattr(runtime, key) for key in keys}
    return replace(profile, **{key: v for key, v in chosen.items() if v != "profile"})


def set_for_nothing(runtime: Runtime, gpus: int) -> list[str]:
    """Return the settings that are set and that only a GPU has, where actors train on CPUs."""
    if gpus and runtime.num_gpus_per_actor != 0:
        return []
    return [
        f"runtime.{key}"
        for key in _SINGLE_ON_GPU
        if key in runtime.model_fields_set and getattr(runtime, key) not in ("profile", False)
    ]


def batch_of(settings: Settings) -> tuple[int, int]:
    """Return batch size, and batches a step: the settings', or the profile's if they say so."""
    h, profile = settings.hierarchy, PROFILES[settings.runtime.gpu_profile]
    return (
        profile.batch_size if h.batch_size == "profile" else h.batch_size,
        profile.accumulation if h.accumulation == "profile" else h.accumulation,
    )


def describe(profile: Profile, name: str, gpus: int) -> str:
    """Return one line on a resolved profile, for the start of a run.

    Parameters
    ----------
    profile : Profile
        From :func:`resolve`.
    name : str
        The setting ``gpu_profile``.
    gpus : int
        How many there are.
    """
    start = f"gpu_profile {name}"
    if profile.gpu_fraction == 0:
        start += f", {'GPUs left unused' if gpus else 'no GPU here'}: CPU settings"
    values = {key: _text(value) for key, value in asdict(profile).items()}
    # Shown only where the settings take them from the profile.
    for key in ("batch_size", "accumulation"):
        values[f"{key} (if left to the profile)"] = values.pop(key)
    return f"{start}: " + ", ".join(f"{key} {value}" for key, value in values.items())


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)
