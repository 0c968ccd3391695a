"""HHAR (Stisen et al., SenSys 2015): phones and watches of 9 people, 6 activities.

The four CSV files are read once, in blocks; rows go to one scratch file for each user, device
and sensor, and then become windows device by device, so memory does not grow with the files.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import count, groupby
from pathlib import Path
from typing import Any

import numpy as np

from fedge_sim.config import AppConfig
from fedge_sim.data import hhar_files
from fedge_sim.data.base import Names
from fedge_sim.data.hhar_csv import (
    CLASSES,
    FileReport,
    Key,
    counted,
    listed,
    read_sensor_file,
    size_of,
)
from fedge_sim.data.hhar_files import SENSORS, Csv, Found
from fedge_sim.data.resampling import (
    ROW,
    Recording,
    Rows,
    Stream,
    clean,
    join,
    sessions,
    windows,
)
from fedge_sim.data.store import Recipe, StoreWriter
from fedge_sim.errors import ConfigError, DataError

READER = 2  # raise it when the same files come to be read in another way
READING_SHARE = 0.8  # of the time that the whole takes


def recipe(config: AppConfig) -> Recipe:
    """Say how HHAR becomes a store; ``data-root`` is the folder of the CSV files, or the archive.

    Raises
    ------
    ConfigError, DataError
        If a window would have fewer than 2 samples, or a file is missing.
    """
    length, stride = config.window_samples
    if length < 2:
        raise ConfigError.at(
            "app.config",
            "window-seconds",
            config.window_seconds,
            "a window must have at least 2 samples at this sample-rate-hz",
        )
    source = hhar_files.find(config)

    def write(writer: StoreWriter) -> tuple[Names, Mapping[str, Any]]:
        with source.opened(writer) as files:
            scattered, reports = _scatter(files, writer)
        names, devices = _write_windows(scattered, writer, config.sample_rate_hz, length, stride)
        return names, {"files": [asdict(report) for report in reports], "devices": devices}

    return Recipe(
        dataset="hhar",
        settings={
            "rate_hz": config.sample_rate_hz,
            "length": length,
            "stride": stride,
            "reader": READER,
            "watches": config.use_watches,
            "members": source.members,
        },
        files=source.files,
        write=write,
    )


Scattered = Mapping[Key, Mapping[str, Path]]


def _scatter(files: Found, writer: StoreWriter) -> tuple[Scattered, list[FileReport]]:
    """Read all files, and append the rows to one scratch file for each device and sensor."""
    scattered: defaultdict[Key, dict[str, Path]] = defaultdict(dict)
    jobs = [(sensor, file) for sensor in SENSORS for file in files[sensor]]
    sizes = [size_of(file) for _, file in jobs]
    reports, done, numbers = [], 0, count()
    for (sensor, file), size in zip(jobs, sizes, strict=True):
        report = FileReport(file.name)
        for key, rows, share in read_sensor_file(file, report):
            path = scattered[key].setdefault(sensor, writer.scratch / f"{next(numbers)}.rows")
            with path.open("ab") as stream:
                stream.write(rows.data)
            writer.tell(file.name, READING_SHARE * (done + share * size) / sum(sizes))
        done += size
        reports.append(report)
        _warn_of_left_out(file, report, writer)
    return scattered, reports


def _warn_of_left_out(file: Csv, report: FileReport, writer: StoreWriter) -> None:
    if report.bad_rows:
        writer.warn(
            f"{file}: {report.bad_rows:,} of {report.rows:,} rows have no time, reading, user, "
            f"model or device; left out; {report.faults()}"
        )
    if report.no_creation:
        writer.warn(
            f"{file}: Creation_Time of {report.no_creation:,} of {report.rows:,} rows is no whole "
            f"number of nanoseconds, such as {report.creation_cell!r}: Arrival_Time is used for "
            "the devices in question"
        )
    if report.unknown_labels:
        listed = counted(report.unknown_labels)
        writer.warn(f"{file}: rows with unknown labels left out: {listed}")


def _write_windows(
    scattered: Scattered, writer: StoreWriter, rate_hz: int, length: int, stride: int
) -> tuple[Names, list[dict[str, Any]]]:
    """Make the windows of every device, user by user, and report what each gave."""
    codes: tuple[dict[str, int], ...] = ({}, {}, {})
    entries: list[dict[str, Any]] = []
    num_sessions = 0
    for _, keys in groupby(sorted(scattered), key=lambda key: key.user):
        recordings: list[tuple[Key, Recording]] = []
        for key in keys:
            writer.tell(f"windows of user {key.user}", _share(len(entries) / len(scattered)))
            entry: dict[str, Any] = {**key._asdict(), "windows": 0}
            entries.append(entry)
            streams = dict(_streams(scattered[key], entry))
            if len(streams) == len(SENSORS):
                acc, gyro = (streams[sensor] for sensor in SENSORS)
                own = list(join(acc, gyro, rate_hz, least=length))
                entry["windows"] = sum(1 + (r.samples.shape[1] - length) // stride for r in own)
                recordings += [(key, recording) for recording in own]
        if not recordings:
            continue
        session, offset = sessions([recording for _, recording in recordings], rate_hz)
        for number, (key, recording) in enumerate(recordings):
            x, y, position = windows(recording, length, stride, len(CLASSES))
            # Users come in sorted order, and so do their codes.
            user, model, device = (
                known.setdefault(name, len(known)) for known, name in zip(codes, key, strict=True)
            )
            writer.add(
                *(x, y),
                user=user,
                model=model,
                device=device,
                recording=num_sessions + session[number],
                position=offset[number] + position,
            )
        num_sessions += int(session.max()) + 1
    _warn_of_devices(entries, writer)
    if num_sessions == 0:
        raise DataError(
            f"hhar: no window of {length} samples in {len(scattered)} devices: none has both "
            "sensors recorded together for so long without a gap of more than 0.5 s; "
            "check the files, or shorten window-seconds"
        )
    return Names(CLASSES, *(tuple(names) for names in codes)), entries


def _share(of_windows: float) -> float:
    return READING_SHARE + (1 - READING_SHARE) * of_windows


def _streams(files: Mapping[str, Path], entry: dict[str, Any]) -> Iterator[tuple[str, Stream]]:
    """Clean the sensors of one device, and report on each."""
    for sensor in SENSORS:
        if sensor not in files:
            entry["problem"] = f"no {sensor}"
            continue
        rows: Rows = np.fromfile(files[sensor], ROW)
        stream = clean(rows)
        entry[sensor] = {
            "rows": len(rows),
            "recorded_twice": stream.num_double,
            "same_time": stream.num_same_time,
            "pieces": len(stream.starts),
        }
        yield sensor, stream


def _warn_of_devices(devices: list[dict[str, Any]], writer: StoreWriter) -> None:
    """Say what was left out, one line for each reason; the store's manifest has it by device."""
    without: defaultdict[str, list[str]] = defaultdict(list)
    for entry in devices:
        if entry["windows"] == 0:
            problem = entry.get("problem", "never both sensors for as long as a window")
            without[problem].append(f"{entry['user']}/{entry['device']}")
    for problem, names in without.items():
        writer.warn(f"user/device left out, {problem}: {listed(names)}")
    double = sum(entry[s]["recorded_twice"] for entry in devices for s in SENSORS if s in entry)
    if double:
        writer.warn(
            f"{double} rows left out, at times that were recorded already: a clock was set back, "
            "or files hold a recording twice"
        )
    users: defaultdict[str, int] = defaultdict(int)
    for entry in devices:
        users[entry["user"]] += entry["windows"]
    if none := [user for user, windows_of in users.items() if windows_of == 0]:
        writer.warn(f"users without any window, so in no client: {listed(none)}")
