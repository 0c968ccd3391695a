"""Make a dataset in HHAR's exact CSV form, of any size: to measure and test the reader.

``python scripts/make_hhar_csv.py OUT_FOLDER --rows 43000000 --seed 42`` writes the four files of
HHAR. The movement is made up, but depends on the activity and the user, so that a network can
learn it; the form is that of the real files, with what makes them hard to read: "null" rows, gaps,
jitter, neighbours exchanged, clocks that disagree, and phones without a gyroscope.

**Size.** The rows are shared out as in the real set, whose files have about 13, 13, 3.5 and 3.5
million rows: 26 parts for phones, 7 for watches. (That is 33 million, but the whole set is commonly
called 43 million rows, hence the default.) Both sensors of a device record equally long, so
``Phones_accelerometer.csv`` is the larger one by the rows of the phones without a gyroscope.

**Small sizes.** Every user carries every device and does each activity once. Where that would make
recordings shorter than ``COMFORTABLE_SECONDS``, each user carries one device of each group only,
the users taking turns; phones and watches each by themselves. If even then an activity would be
too short for a window of 2 s, the size is refused.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import polars as pl
import typer
from numpy.typing import NDArray

from fedge_sim.data.hhar_synthetic import GRAVITY, Activity

USERS = "abcdefghi"
EPOCH_SECONDS = 1_424_696_633  # first user's first day, Unix time
DAY_SECONDS = 86_400

COMFORTABLE_SECONDS = 8.0  # of a recording: an activity, and "null" after it
SHORTEST_SECONDS = 2.0  # of an activity: one window
NULL_SHARE = 0.1  # of a recording
SPREAD = 0.1  # lengths differ by up to this share
KNOT_SECONDS = 2.0  # tempo, strength and posture change this slowly
EXCHANGED_SHARE = 0.005  # of pairs of rows

# The smallest step of each sensor, in its unit, as of the Nexus 4 in the real files. Multiples of
# it in single precision print as there: plain decimals of 7 to 9 digits.
RESOLUTION = {"accelerometer": 0.0011901855, "gyroscope": 0.0010681152}
NOISE = {"accelerometer": 0.25, "gyroscope": 0.05}
SENSORS = tuple(RESOLUTION)

# What a random stream is for. All keys have one length: numpy takes [1] and [1, 0] for the same.
PERSON, PLAN, SAMPLES = range(3)


# Named as in the files.
ACTIVITIES = (
    Activity("bike", tempo=1.3, swing=1.3, spin=1.5, pitch=30.0, skew=0.0),
    Activity("sit", tempo=0.3, swing=0.1, spin=0.03, pitch=60.0, skew=0.0),
    Activity("stand", tempo=0.5, swing=0.2, spin=0.06, pitch=8.0, skew=0.0),
    Activity("walk", tempo=1.9, swing=2.6, spin=0.9, pitch=5.0, skew=0.0),
    Activity("stairsup", tempo=1.6, swing=2.2, spin=0.8, pitch=14.0, skew=0.5),
    Activity("stairsdown", tempo=2.1, swing=3.2, spin=1.0, pitch=2.0, skew=-0.5),
)
NULL = Activity("null", tempo=0.8, swing=0.8, spin=0.5, pitch=35.0, skew=0.0)


@dataclass(frozen=True)
class Device:
    """A phone or watch: its number among all, native rate (Hz) and sensors."""

    number: int
    model: str
    name: str
    rate: int
    sensors: tuple[str, ...] = SENSORS


@dataclass(frozen=True)
class Kind:
    """Phones or watches.

    Attributes
    ----------
    prefix : str
        Of the names of the files.
    parts : int
        Share of all rows.
    groups : tuple of tuple of Device
        At small sizes a user carries one device of each group.
    counts_from_boot : bool
        Whether Creation_Time counts from boot, and jumps between recordings, or is a Unix time.
    delay : float
        Seconds from a sample to its arrival, on average.
    """

    prefix: str
    parts: int
    groups: tuple[tuple[Device, ...], ...]
    counts_from_boot: bool
    delay: float

    def carried(self, user: int, few: bool) -> tuple[Device, ...]:
        """Return the devices that a user carries."""
        if few:
            return tuple(group[user % len(group)] for group in self.groups)
        return sum(self.groups, ())

    def rows_per_second(self, few: bool) -> int:
        """Return the rows of all users' devices while they record."""
        carried = (device for user in range(len(USERS)) for device in self.carried(user, few))
        return sum(device.rate * len(device.sensors) for device in carried)


PHONES = Kind(
    prefix="Phones",
    parts=26,
    groups=(
        (
            Device(0, "nexus4", "nexus4_1", 200),
            Device(1, "nexus4", "nexus4_2", 200),
            Device(2, "s3", "s3_1", 150),
            Device(3, "s3", "s3_2", 150),
            Device(4, "s3mini", "s3mini_1", 100),
            Device(5, "s3mini", "s3mini_2", 100),
        ),
        # A group of its own: alone it would leave a user without any gyroscope.
        (
            Device(6, "samsungold", "samsungold_1", 50, SENSORS[:1]),
            Device(7, "samsungold", "samsungold_2", 50, SENSORS[:1]),
        ),
    ),
    counts_from_boot=False,
    delay=0.005,
)
WATCHES = Kind(
    prefix="Watch",
    parts=7,
    groups=(
        (
            Device(8, "gear", "gear_1", 100),
            Device(9, "gear", "gear_2", 100),
            Device(10, "lgwatch", "lgwatch_1", 200),
            Device(11, "lgwatch", "lgwatch_2", 200),
        ),
    ),
    counts_from_boot=True,
    delay=0.02,
)


@dataclass(frozen=True)
class Bout:
    """A stretch of one activity, as one device lived through it: shared by its two sensors.

    Attributes
    ----------
    start, seconds : float
        Unix time and length.
    clock : int
        Nanoseconds that the device's clock is ahead of Unix time.
    knots : float array (knots,)
        Seconds since the start at which the other arrays are given.
    cycles, strength : float array (knots,)
        Cycles done so far, and the amplitude's factor.
    pitch, roll : float array (knots,)
        Angles of the device, radians.
    """

    activity: Activity
    start: float
    seconds: float
    clock: int
    knots: NDArray[np.float64]
    cycles: NDArray[np.float64]
    strength: NDArray[np.float64]
    pitch: NDArray[np.float64]
    roll: NDArray[np.float64]


def make(folder: Path, rows: int, seed: int, watches: bool = True) -> int:
    """Write the files of a dataset; the same arguments give the same bytes.

    Parameters
    ----------
    folder : Path
        Made if it does not exist.
    rows : int
        Of all files together, about.
    seed : int
        0 or more.
    watches : bool
        Whether to make the watches' files too; without them the phones get all rows.

    Returns
    -------
    int
        Rows written.

    Raises
    ------
    ValueError
        If an activity would be shorter than ``SHORTEST_SECONDS``.
    """
    kinds = (PHONES, WATCHES) if watches else (PHONES,)
    parts = sum(kind.parts for kind in kinds)
    lengths = [recording_seconds(kind, rows * kind.parts / parts) for kind in kinds]
    least = SHORTEST_SECONDS / (1 - NULL_SHARE) / (1 - SPREAD)
    if min(seconds for _, seconds in lengths) < least:
        slowest = max(kind.rows_per_second(few=True) / kind.parts for kind in kinds)
        needed = int(slowest * parts * least * len(ACTIVITIES)) + 1
        raise ValueError(f"{rows} rows are too few for windows of 2 s: at least {needed}")
    folder.mkdir(parents=True, exist_ok=True)
    return sum(
        write(folder / f"{kind.prefix}_{sensor}.csv", kind, sensor, few, seconds, seed)
        for kind, (few, seconds) in zip(kinds, lengths, strict=True)
        for sensor in SENSORS
    )


def recording_seconds(kind: Kind, rows: float) -> tuple[bool, float]:
    """Return whether users carry few devices, and the mean length of a recording."""
    for few in (False, True):
        seconds = rows / kind.rows_per_second(few) / len(ACTIVITIES)
        if seconds >= COMFORTABLE_SECONDS:
            break
    return few, seconds


def write(path: Path, kind: Kind, sensor: str, few: bool, seconds: float, seed: int) -> int:
    """Write one file, and return the number of its rows."""
    rows = 0
    with path.open("wb") as file:
        for user in range(len(USERS)):
            for device in kind.carried(user, few):
                if sensor in device.sensors:
                    bouts = plan(kind, device, user, seconds, seed)
                    frame = stream(kind, device, sensor, user, bouts, seed)
                    frame.write_csv(file, include_header=rows == 0)
                    rows += len(frame)
    return rows


def plan(kind: Kind, device: Device, user: int, seconds: float, seed: int) -> Iterator[Bout]:
    """Yield what a user does with a device: all activities, each a recording, gaps between."""
    person = np.random.default_rng([seed, PERSON, user, 0, 0])
    tempo, amplitude = np.exp(person.normal(0.0, [0.05, 0.15]))
    lean = person.normal(0.0, np.radians(6.0), size=2)
    rng = np.random.default_rng([seed, PLAN, user, device.number, 0])

    now = EPOCH_SECONDS + user * DAY_SECONDS + rng.uniform(0.0, 5.0)
    # A phone's clock is some seconds wrong; a watch was started some hours ago.
    clock = rng.uniform(1e3, 1e5) - now if kind.counts_from_boot else rng.normal(0.0, 5.0)
    for i in rng.permutation(len(ACTIVITIES)):
        length = seconds * rng.uniform(1 - SPREAD, 1 + SPREAD)
        for activity, share in ((ACTIVITIES[i], 1 - NULL_SHARE), (NULL, NULL_SHARE)):
            knots = np.arange(0.0, share * length + KNOT_SECONDS, KNOT_SECONDS)
            wander = rng.normal(0.0, [[0.08], [0.2], [0.08], [0.08]], size=(4, len(knots)))
            steps = activity.tempo * tempo * np.exp(wander[0]) * KNOT_SECONDS
            yield Bout(
                activity=activity,
                start=now,
                seconds=share * length,
                clock=round(clock * 1e9),
                knots=knots,
                cycles=rng.uniform() + np.cumsum(steps),
                strength=amplitude * np.exp(wander[1]),
                pitch=np.radians(activity.pitch) + lean[0] + wander[2],
                roll=lean[1] + wander[3],
            )
            now += share * length
        now += rng.uniform(4.0, 30.0)
        if kind.counts_from_boot:
            clock += rng.uniform(1.0, 60.0)


def stream(
    kind: Kind, device: Device, sensor: str, user: int, bouts: Iterable[Bout], seed: int
) -> pl.DataFrame:
    """Return the rows of one sensor of one user's device."""
    rng = np.random.default_rng([seed, SAMPLES, user, device.number, SENSORS.index(sensor)])
    rate = device.rate * (1 + rng.normal(0.0, 0.003))  # no two sensors tick alike
    phase = rng.uniform(0.3, 0.7)
    frames: list[pl.DataFrame] = []
    rows, last_arrival = 0, 0.0
    for bout in bouts:
        n = int(bout.seconds * rate)
        t = (np.arange(n) + phase + rng.uniform(-0.2, 0.2, size=n)) / rate
        # A late row holds up those behind it, so that several arrive together.
        arrival = bout.start + np.maximum.accumulate(t + rng.exponential(kind.delay, size=n))
        arrival = np.maximum(arrival, last_arrival)
        x, y, z = measured(bout, sensor, t, rng)
        order = exchanged(n, rng)
        numbers = {
            "Index": rows + order,
            "Arrival_Time": (arrival[order] * 1e3).astype(np.int64),
            "Creation_Time": nanoseconds(bout.start) + bout.clock + nanoseconds(t[order]),
            "x": x[order],
            "y": y[order],
            "z": z[order],
        }
        names = {
            "User": USERS[user],
            "Model": device.model,
            "Device": device.name,
            "gt": bout.activity.name,
        }
        repeated = {key: pl.Series([name]).new_from_index(0, n) for key, name in names.items()}
        frames.append(pl.DataFrame(numbers | repeated))
        rows, last_arrival = rows + n, arrival[-1]
    return pl.concat(frames)


def measured(
    bout: Bout, sensor: str, t: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Return what a sensor measures at times ``t`` (n,): x, y, z, an array (3, n)."""

    def at(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.interp(t, bout.knots, values)

    activity, phase, strength = bout.activity, 2 * np.pi * at(bout.cycles), at(bout.strength)
    beat = np.sin(phase) + activity.skew * np.cos(2 * phase)
    sway = np.sin(phase / 2)  # left and right foot: half the step's tempo
    if sensor == "accelerometer":
        pitch, roll = at(bout.pitch), at(bout.roll)
        clean = activity.swing * strength * np.stack([0.4 * sway, 0.5 * np.cos(phase), beat])
        clean += GRAVITY * np.stack(
            [np.sin(roll), np.sin(pitch) * np.cos(roll), np.cos(pitch) * np.cos(roll)]
        )
    else:
        clean = activity.spin * strength * np.stack([np.cos(phase), 0.6 * sway, 0.3 * beat])
    noisy = clean + NOISE[sensor] * rng.standard_normal(clean.shape)
    step = RESOLUTION[sensor]
    return (np.round(noisy / step) * step).astype(np.float32)


def exchanged(n: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return 0 to n - 1, now and then with two neighbours exchanged."""
    order = np.arange(n)
    first = 2 * np.flatnonzero(rng.random(n // 2) < EXCHANGED_SHARE)
    order[first], order[first + 1] = first + 1, first
    return order


def nanoseconds(seconds: float | NDArray[np.float64]) -> NDArray[np.int64]:
    """Return seconds as whole nanoseconds."""
    return (np.asarray(seconds) * 1e9).astype(np.int64)


def main(
    folder: Annotated[
        Path,
        typer.Argument(metavar="OUT_FOLDER", file_okay=False, help="Files in it are replaced."),
    ],
    rows: Annotated[int, typer.Option(help="Of all files together, about.")] = 43_000_000,
    seed: Annotated[int, typer.Option(min=0, help="Everything derives from it.")] = 42,
    watches: Annotated[bool, typer.Option(help="Whether to make the watches' files too.")] = True,
) -> None:
    """Make a dataset in HHAR's CSV form."""
    try:
        written = make(folder, rows, seed, watches)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--rows") from error
    except OSError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{written:,} rows in {folder}")


if __name__ == "__main__":
    typer.run(main)
