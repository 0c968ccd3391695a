"""How many actors, of what size: from the settings, the machine and what was measured.

Pure: it looks at nothing but its arguments. What the user fixed is never changed; if it does
not fit, the error says what would.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fedge_sim.config import Runtime, Settings
from fedge_sim.errors import ConfigError
from fedge_sim.runtime.gpu import Profile
from fedge_sim.training.choice import Choice

MAX_COHORT = 256  # clients in one step: more gain nothing, and all wait for the slowest
_PARTS = 10_000  # Ray counts GPUs in ten-thousandths


@dataclass(frozen=True)
class Machine:
    """The hardware to train on: one machine, or all of a Ray cluster.

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
        Bytes by which it grows, at its peak, for each client that it trains at a time.
    """

    base: int
    per_client: int

    def of(self, clients: int) -> int:
        """Return the bytes that an actor takes which trains ``clients`` at a time."""
        return self.base + clients * self.per_client

    def clients_in(self, memory: int) -> int:
        """Return how many clients at a time fit into a number of bytes, 0 or less if none does."""
        return (memory - self.base) // max(self.per_client, 1)


@dataclass(frozen=True)
class Plan:
    """How many actors, and of what size.

    Attributes
    ----------
    actors : int
    threads : int
        Compute threads of an actor: streams x threads_per_client.
    cpus_per_actor, gpus_per_actor : float
        What an actor asks Ray for.
    cohort_size : int
        Clients that are trained together, in one vectorised step.
    memory_cap : int
        Bytes that an actor may use: of its GPU where it has one, else of the host.
    streams : int
        Cohorts that an actor works on side by side.
    """

    actors: int
    threads: int
    cpus_per_actor: float
    gpus_per_actor: float
    cohort_size: int
    memory_cap: int
    streams: int = 1

    @property
    def at_a_time(self) -> int:
        """Clients that an actor trains at a time."""
        return self.streams * self.cohort_size

    def describe(self, num_clients: int) -> str:
        """Return one line on the plan and the waves in which it trains all clients."""
        exact = num_clients / (self.actors * self.at_a_time)
        waves = math.ceil(exact)
        streams = f" on each of {self.streams} streams" if self.streams > 1 else ""
        rounded = "" if exact == waves else f"{exact:.2f}".rstrip("0").rstrip(".") + " -> "
        return (
            f"{_count(self.actors, 'actor')} x {_count(self.threads, 'thread')}, "
            f"GPU fraction {self.gpus_per_actor:g}, cohort size {self.cohort_size}{streams}; "
            f"{_count(num_clients, 'client')} on {_count(self.actors, 'actor')}: "
            f"{rounded}{_count(waves, 'wave')} a round"
        )


def is_open(runtime: Runtime) -> bool:
    """Whether something of how to train is to be measured: see :func:`settle`."""
    return (
        runtime.training == "auto"
        or (runtime.training == "single" and runtime.compile == "auto")
        or (runtime.training == "cohort" and runtime.cohort_size == "auto")
    )


def settle(settings: Settings, choice: Choice) -> Settings:
    """Return the settings with what was measured in place of ``"auto"``.

    A cohort size that the user fixed has no meaning for a network without cohorts.
    """
    runtime = settings.runtime
    training, size = runtime.training, runtime.cohort_size
    if training == "auto":
        training = choice.training
        size = size if training == "cohort" else "auto"
    compiled = choice.compile if runtime.compile == "auto" else runtime.compile
    return settings.with_runtime(training=training, compile=compiled, cohort_size=size)


def settle_cohort(settings: Settings, size: int) -> Settings:
    """Return the settings with this size of a cohort, if they have cohorts."""
    cohorts = settings.runtime.training == "cohort"
    return settings.with_runtime(cohort_size=size) if cohorts else settings


def plan(
    settings: Settings,
    profile: Profile,
    machine: Machine,
    need: Need | None = None,
    best_cohort: int = 1,
) -> Plan:
    """Choose the number and the size of the actors.

    Where the cohort size is ``"auto"``, all cores are given an actor before clients share one.

    Parameters
    ----------
    settings : Settings
    profile : Profile
        As resolved for this machine.
    machine : Machine
    need : Need, optional
        Without it, memory sets no limit: the most that cores and GPUs allow.
    best_cohort : int
        The cohort size that trains most clients a second, for ``cohort_size = "auto"``.

    Raises
    ------
    ConfigError
        If what the settings fix does not fit the machine, or not even one client does.
    """
    runtime, clients = settings.runtime, settings.clients_at_a_time
    refuse_missing_gpu(runtime, machine.gpus)
    fixed = fixed_cohort(runtime)
    most = _most_by_cores(runtime, machine)
    if runtime.num_workers == "auto":
        wanted = min(most, math.ceil(clients / (fixed or 1)))
    else:
        wanted = runtime.num_workers
        threads = _count(runtime.threads_per_client, "compute thread")
        cpus = f"{_cpus(runtime):g}"
        limit = f"{threads} and CPUs {cpus} an actor, on {_count(machine.cores, 'core')}"
        _check_workers(runtime, most, limit)
    if profile.gpu_fraction > 0 and machine.gpus > 0:
        return _plan_on_gpus(settings, profile, machine, need, wanted, best_cohort)
    return _plan_on_cpu(settings, profile, machine, need, wanted, best_cohort)


def _plan_on_cpu(
    settings: Settings,
    profile: Profile,
    machine: Machine,
    need: Need | None,
    actors: int,
    best_cohort: int,
) -> Plan:
    runtime, clients = settings.runtime, settings.clients_at_a_time
    fixed, room = fixed_cohort(runtime), MAX_COHORT
    allowed = int(machine.memory * profile.memory_share)
    if need is not None:
        smallest = need.of(fixed or 1)
        fits = allowed // max(smallest, 1)
        if fits == 0:
            raise _no_room(runtime, profile, need, fixed or 1, allowed)
        measured = f"{_gib(smallest)} an actor, measured, of {_gib(allowed)} allowed"
        _check_workers(runtime, fits, f"{measured} (memory_share {profile.memory_share:g})")
        actors = min(actors, fits)
        room = need.clients_in(allowed // actors)
    return Plan(
        actors=actors,
        threads=runtime.threads_per_client,
        cpus_per_actor=_cpus(runtime),
        gpus_per_actor=0.0,
        cohort_size=fixed or min(best_cohort, room, math.ceil(clients / actors), MAX_COHORT),
        memory_cap=allowed // actors,
    )


def _plan_on_gpus(
    settings: Settings,
    profile: Profile,
    machine: Machine,
    need: Need | None,
    wanted: int,
    best_cohort: int,
) -> Plan:
    """Take the smallest fraction, from the profile's up, in which a client has room."""
    runtime, clients = settings.runtime, settings.clients_at_a_time
    fixed = fixed_cohort(runtime)
    measured, need, cap = need is not None, need or Need(0, 0), 0
    for fraction in _fractions(runtime, profile):
        slots = math.floor(1 / fraction + 1e-9) * machine.gpus
        if fraction == profile.gpu_fraction:
            gpus = _count(machine.gpus, "GPU")
            _check_workers(runtime, slots, f"a GPU fraction of {fraction:g} an actor, on {gpus}")
        elif runtime.num_workers != "auto" and wanted > slots:
            break
        cap = int(machine.gpu_memory * profile.memory_share * fraction)
        room = need.clients_in(cap) if measured else clients
        if measured and room < (fixed or 1):
            continue
        actors = min(wanted, slots)
        each = math.ceil(clients / actors)
        cohort = fixed or min(best_cohort, room, each, MAX_COHORT)
        cores = machine.cores // (actors * runtime.threads_per_client)
        streams = max(1, min(profile.streams, room // cohort, math.ceil(each / cohort), cores))
        return Plan(
            actors=actors,
            threads=streams * runtime.threads_per_client,
            cpus_per_actor=_cpus(runtime, streams),
            gpus_per_actor=fraction,
            cohort_size=cohort,
            memory_cap=cap,
            streams=streams,
        )
    raise _no_room(runtime, profile, need, fixed or 1, cap)


def refuse_missing_gpu(runtime: Runtime, gpus: int) -> None:
    """Raise ConfigError if a part of a GPU is asked for, and there is none."""
    if gpus == 0 and runtime.num_gpus_per_actor not in ("auto", 0):
        problem = 'there is no GPU here; set 0 or "auto"'
        raise ConfigError.at("runtime", "num_gpus_per_actor", runtime.num_gpus_per_actor, problem)


def fixed_cohort(runtime: Runtime) -> int | None:
    """Return the cohort size that the settings fix, None if it is to be found."""
    size, training = runtime.cohort_size, runtime.training
    if size == "auto":
        return 1 if training in ("reference", "single") else None
    if size > 1 and training in ("reference", "single"):
        problem = f'must be 1 or "auto" with training = "{training}": it trains clients one by one'
        raise ConfigError.at("runtime", "cohort_size", size, problem)
    if size > MAX_COHORT:
        raise ConfigError.at("runtime", "cohort_size", size, f"must be at most {MAX_COHORT}")
    return size


def _fractions(runtime: Runtime, profile: Profile) -> Iterator[float]:
    """Yield the GPU fractions to try: the profile's, then larger ones unless it is fixed."""
    yield profile.gpu_fraction
    if runtime.num_gpus_per_actor == "auto":
        for actors in range(math.floor(1 / profile.gpu_fraction), 0, -1):
            if (fraction := math.floor(_PARTS / actors) / _PARTS) > profile.gpu_fraction:
                yield fraction


def _most_by_cores(runtime: Runtime, machine: Machine) -> int:
    """Return how many actors the cores carry, at least 1."""
    cores, threads = machine.cores, runtime.threads_per_client
    here = f": there {'is 1 core' if cores == 1 else f'are {cores} cores'} here"
    if threads > cores:
        problem = f"must be at most {cores}{here}"
        raise ConfigError.at("runtime", "threads_per_client", threads, problem)
    if (cpus := _cpus(runtime)) > cores:
        problem = f"must be at most {cores}{here}"
        raise ConfigError.at("runtime", "num_cpus_per_actor", cpus, problem)
    return min(cores // threads, math.floor(cores / cpus + 1e-9))


def _cpus(runtime: Runtime, streams: int = 1) -> float:
    """Return the CPUs that an actor asks Ray for: one for each compute thread, unless fixed."""
    fixed = runtime.num_cpus_per_actor
    return float(streams * runtime.threads_per_client) if fixed == "auto" else fixed


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
        f"trains at a time, measured; allowed are {_gib(allowed)}"
    )
    if (fits := need.clients_in(allowed)) >= 1:
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
