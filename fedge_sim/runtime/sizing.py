"""How many actors, of what size: from the settings, the machine and what a client needs.

Pure: it looks at nothing but its arguments. What the user fixed is never changed; if it does
not fit, the error says what would.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fedge_sim.config import Runtime, Settings
from fedge_sim.errors import ConfigError
from fedge_sim.runtime.gpu import Profile

_PARTS = 10_000  # Ray counts GPUs in parts of so many


@dataclass(frozen=True)
class Machine:
    """What there is to train on: one machine, or all of a Ray cluster.

    Attributes
    ----------
    cores : int
    memory : int
        Bytes of the host that are free.
    gpus : int
    gpu_memory : int
        Bytes of one GPU.
    """

    cores: int
    memory: int
    gpus: int = 0
    gpu_memory: int = 0


@dataclass(frozen=True)
class Need:
    """Measured memory: of the GPU where actors have one, else private memory of the host.

    Attributes
    ----------
    base : int
        Bytes of an actor that does nothing; on a GPU, its context.
    per_client : int
        Bytes by which it grows, at its peak, for each client of a cohort.
    """

    base: int
    per_client: int

    def of(self, cohort_size: int) -> int:
        """Return the bytes of an actor that trains so many clients side by side."""
        return self.base + cohort_size * self.per_client

    def cohort_in(self, memory: int) -> int:
        """Return the largest cohort that fits in so many bytes, 0 or less if none does."""
        return (memory - self.base) // max(self.per_client, 1)


@dataclass(frozen=True)
class Plan:
    """How many actors, and of what size.

    Attributes
    ----------
    actors : int
    threads : int
        Compute threads of an actor: cohort_size x threads_per_client.
    cpus_per_actor, gpus_per_actor : float
        What an actor asks Ray for.
    cohort_size : int
        Clients that an actor trains side by side.
    memory_cap : int
        Bytes that an actor may use: of its GPU where it has one, else of the host.
    """

    actors: int
    threads: int
    cpus_per_actor: float
    gpus_per_actor: float
    cohort_size: int
    memory_cap: int

    def describe(self, num_clients: int) -> str:
        """Return one line on the plan and the waves in which it trains all clients."""
        exact = num_clients / (self.actors * self.cohort_size)
        waves = math.ceil(exact)
        rounded = "" if exact == waves else f"{exact:.2f}".rstrip("0").rstrip(".") + " -> "
        return (
            f"{_count(self.actors, 'actor')} x {_count(self.threads, 'thread')}, "
            f"GPU fraction {self.gpus_per_actor:g}, cohort size {self.cohort_size}; "
            f"{_count(num_clients, 'client')} on {_count(self.actors, 'actor')}: "
            f"{rounded}{_count(waves, 'wave')} a round"
        )


def plan(settings: Settings, profile: Profile, machine: Machine, need: Need | None = None) -> Plan:
    """Choose the number and the size of the actors.

    Parameters
    ----------
    settings : Settings
    profile : Profile
        As resolved for this machine.
    machine : Machine
    need : Need, optional
        Without it, memory sets no limit: the most that cores and GPUs allow.

    Raises
    ------
    ConfigError
        If what the settings fix does not fit the machine, or not even one client does.
    """
    runtime = settings.runtime
    if runtime.num_gpus_per_actor not in ("auto", 0) and machine.gpus == 0:
        problem = 'there is no GPU here; set 0 or "auto"'
        raise ConfigError.at("runtime", "num_gpus_per_actor", runtime.num_gpus_per_actor, problem)
    cohort = 1 if runtime.cohort_size == "auto" else runtime.cohort_size
    most = _most_by_cores(runtime, machine, cohort)
    if runtime.num_workers == "auto":
        wanted = min(most, math.ceil(settings.hierarchy.num_clients / cohort))
    else:
        wanted = runtime.num_workers
        threads = _count(cohort * runtime.threads_per_client, "compute thread")
        cpus = f"{_cpus(runtime, cohort):g}"
        limit = f"{threads} and CPUs {cpus} an actor, on {_count(machine.cores, 'core')}"
        _check_workers(runtime, most, limit)
    if profile.gpu_fraction > 0 and machine.gpus > 0:
        return _plan_on_gpus(settings, profile, machine, need, wanted)
    return _plan_on_cpu(runtime, profile, machine, need, wanted)


def _plan_on_cpu(
    runtime: Runtime, profile: Profile, machine: Machine, need: Need | None, actors: int
) -> Plan:
    allowed = int(machine.memory * profile.memory_share)
    cohort = 1 if runtime.cohort_size == "auto" else runtime.cohort_size
    if need is not None:
        fits = allowed // max(need.of(cohort), 1)
        if fits == 0:
            raise _no_room(runtime, profile, need, cohort, allowed)
        measured = f"{_gib(need.of(cohort))} an actor, measured, of {_gib(allowed)} allowed"
        _check_workers(runtime, fits, f"{measured} (memory_share {profile.memory_share:g})")
        actors = min(actors, fits)
    return Plan(
        actors=actors,
        threads=cohort * runtime.threads_per_client,
        cpus_per_actor=_cpus(runtime, cohort),
        gpus_per_actor=0.0,
        cohort_size=cohort,
        memory_cap=allowed // actors,
    )


def _plan_on_gpus(
    settings: Settings, profile: Profile, machine: Machine, need: Need | None, wanted: int
) -> Plan:
    """Take the smallest fraction, from the profile's up, in which a client has room."""
    runtime, clients = settings.runtime, settings.hierarchy.num_clients
    fixed = None if runtime.cohort_size == "auto" else runtime.cohort_size
    measured, need, cap = need is not None, need or Need(0, 0), 0
    for fraction in _fractions(runtime, profile):
        slots = math.floor(1 / fraction + 1e-9) * machine.gpus
        if fraction == profile.gpu_fraction:
            gpus = _count(machine.gpus, "GPU")
            _check_workers(runtime, slots, f"a GPU fraction of {fraction:g} an actor, on {gpus}")
        elif runtime.num_workers != "auto" and wanted > slots:
            break
        cap = int(machine.gpu_memory * profile.memory_share * fraction)
        room = need.cohort_in(cap) if measured else clients
        if measured and room < (fixed or 1):
            continue
        actors = min(wanted, slots)
        cores = machine.cores // (actors * runtime.threads_per_client)
        cohort = fixed or min(profile.streams, room, math.ceil(clients / actors), cores)
        return Plan(
            actors=actors,
            threads=cohort * runtime.threads_per_client,
            cpus_per_actor=_cpus(runtime, cohort),
            gpus_per_actor=fraction,
            cohort_size=cohort,
            memory_cap=cap,
        )
    raise _no_room(runtime, profile, need, fixed or 1, cap)


def _fractions(runtime: Runtime, profile: Profile) -> Iterator[float]:
    """Yield the GPU fractions to try: the profile's, then larger ones unless it is fixed."""
    yield profile.gpu_fraction
    if runtime.num_gpus_per_actor == "auto":
        for actors in range(math.floor(1 / profile.gpu_fraction), 0, -1):
            if (fraction := math.floor(_PARTS / actors) / _PARTS) > profile.gpu_fraction:
                yield fraction


def _most_by_cores(runtime: Runtime, machine: Machine, cohort: int) -> int:
    """Return how many actors the cores carry, at least 1."""
    cores, threads = machine.cores, runtime.threads_per_client
    here = f": there {'is 1 core' if cores == 1 else f'are {cores} cores'} here"
    if threads > cores:
        problem = f"must be at most {cores}{here}"
        raise ConfigError.at("runtime", "threads_per_client", threads, problem)
    if cohort * threads > cores:
        problem = f"must be at most {cores // threads} (x threads_per_client = {threads}){here}"
        raise ConfigError.at("runtime", "cohort_size", cohort, problem)
    if (cpus := _cpus(runtime, cohort)) > cores:
        problem = f"must be at most {cores}{here}"
        raise ConfigError.at("runtime", "num_cpus_per_actor", cpus, problem)
    return min(cores // (cohort * threads), math.floor(cores / cpus + 1e-9))


def _cpus(runtime: Runtime, cohort: int) -> float:
    """Return the CPUs that an actor asks Ray for: one for each compute thread, unless fixed."""
    fixed = runtime.num_cpus_per_actor
    return float(cohort * runtime.threads_per_client) if fixed == "auto" else fixed


def _check_workers(runtime: Runtime, most: int, limit: str) -> None:
    """Refuse more actors than fit, if the user fixed their number."""
    if runtime.num_workers != "auto" and runtime.num_workers > most:
        problem = f"must be at most {most}: {limit}"
        raise ConfigError.at("runtime", "num_workers", runtime.num_workers, problem)


def _no_room(
    runtime: Runtime, profile: Profile, need: Need, cohort: int, allowed: int
) -> ConfigError:
    """Return the error of a cohort that has no room even where an actor has all it may get."""
    measured = (
        f"an actor takes {_gib(need.base)} and {_gib(need.per_client)} for each client that it "
        f"trains side by side, measured; allowed are {_gib(allowed)}"
    )
    if (fits := need.cohort_in(allowed)) >= 1:
        problem = f"must be at most {fits}: {measured}"
        return ConfigError.at("runtime", "cohort_size", cohort, problem)
    larger = "memory_share"
    if runtime.num_gpus_per_actor not in ("auto", 0):
        larger += " or num_gpus_per_actor"
    smaller = "hierarchy.batch_size"
    if runtime.num_workers not in ("auto", 1):
        smaller += " or num_workers"
    problem = (
        f"{profile.memory_share:g} has no room for one client: {measured}; "
        f"set a larger {larger}, or a smaller {smaller}"
    )
    return ConfigError.at("runtime", "memory_share", runtime.memory_share, problem)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
