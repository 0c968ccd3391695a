"""From the rows of one device's two sensors to windows: pure functions on arrays.

Times are in nanoseconds. Rows come as a structured array, :data:`ROW`, in file order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

ROW = np.dtype(
    [
        ("arrival", np.int64),  # when the recorder got the row: one clock for all devices
        ("creation", np.int64),  # when the sensor made it, on a clock of its own, or UNKNOWN
        ("xyz", np.float32, 3),
        ("label", np.int8),
    ]
)
UNKNOWN = np.iinfo(np.int64).min
Rows = NDArray[np.void]

# No window spans a pause in which a sensor says nothing for longer than this.
MAX_GAP = 500_000_000
# A clock that jumps, or a file that steps back, more often than this is no clock, or not in order.
MAX_JUMPS = 0.02


@dataclass(frozen=True)
class Stream:
    """One sensor of one device, cleaned: times never step back, and pieces are uninterrupted.

    Attributes
    ----------
    time : int64 array (n,)
        Nanoseconds on the recorder's clock, ascending.
    xyz : float32 array (n, 3)
    label : int8 array (n,)
    starts, ends : int64 array (pieces,)
        Rows [start, end) of each piece, in ascending order of time.
    num_double : int
        Rows left out: the clock had stepped back over times that were recorded already.
    num_same_time : int
        Rows at the very time of the one before; such rows are averaged by :func:`resample`.
    """

    time: NDArray[np.int64]
    xyz: NDArray[np.float32]
    label: NDArray[np.int8]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    num_double: int
    num_same_time: int


@dataclass(frozen=True)
class Recording:
    """An uninterrupted recording of both sensors at one rate.

    Attributes
    ----------
    begin : int
        Time of the first sample, nanoseconds on the recorder's clock.
    samples : float32 array (6, n)
        acc_x, acc_y, acc_z, gyro_x, gyro_y, gyro_z.
    label : int8 array (n,)
    """

    begin: int
    samples: NDArray[np.float32]
    label: NDArray[np.int8]


def clean(rows: Rows) -> Stream:
    """Put the rows of one sensor in order of time, and find where it was interrupted.

    A new piece begins where either clock steps by more than :data:`MAX_GAP`, forwards or
    backwards. Inside a piece time runs as the sensor's clock says, shifted to the recorder's
    by the least delay seen in the piece (delays are never negative, so the least is nearest to
    the true shift); a piece in which the two clocks disagree, and a sensor whose clock is
    unknown for some row or jumps all the time, goes by the recorder's clock alone.
    """
    rows = _in_order(rows)
    arrival, creation = rows["arrival"], rows["creation"]
    jump = np.abs(np.diff(arrival)) > MAX_GAP
    use_creation = len(rows) > 0 and not (creation == UNKNOWN).any()
    if use_creation:
        sensor_jump = np.abs(np.diff(creation)) > MAX_GAP
        use_creation = sensor_jump.sum() <= MAX_JUMPS * len(rows) + 1
        if use_creation:
            jump |= sensor_jump
    first = np.flatnonzero(np.r_[len(rows) > 0, jump])  # first row of each piece
    time = arrival
    if use_creation:
        size = np.diff(np.r_[first, len(rows)])
        delay = arrival - creation
        least = np.minimum.reduceat(delay, first)
        agree = np.maximum.reduceat(delay, first) - least <= MAX_GAP
        time = np.where(np.repeat(agree, size), creation + np.repeat(least, size), arrival)
    return _one_after_another(time, rows, first)


def _in_order(rows: Rows) -> Rows:
    """Return the rows in the order of recording, as far as the file has lost it.

    Rows with one arrival time were written in any order: the sensor's clock sorts them. A
    file whose rows step back all the time was shuffled, and is sorted as a whole.
    """
    arrival, creation = rows["arrival"], rows["creation"]
    step = np.diff(arrival)
    if (step < -MAX_GAP).sum() > MAX_JUMPS * len(rows):
        return rows[np.lexsort((creation, arrival))]
    if ((step == 0) & (np.diff(creation) < 0)).any():
        same_arrival = np.cumsum(np.r_[0, step != 0])
        return rows[np.lexsort((creation, same_arrival))]
    return rows


def _one_after_another(time: NDArray[np.int64], rows: Rows, first: NDArray[np.int64]) -> Stream:
    """Order the pieces by their start, and leave out what an earlier one covers already."""
    piece = np.cumsum(np.bincount(first, minlength=len(rows))) - 1
    begin = np.minimum.reduceat(time, first) if len(first) else first
    end = np.maximum.reduceat(time, first) if len(first) else first
    rank = np.empty(len(first), np.int64)
    by_begin = np.argsort(begin, kind="stable")
    rank[by_begin] = np.arange(len(first))
    covered = np.full(len(first), UNKNOWN)
    covered[by_begin[1:]] = np.maximum.accumulate(end[by_begin])[:-1]
    kept = np.flatnonzero(time > covered[piece])
    kept = kept[np.lexsort((time[kept], rank[piece[kept]]))]
    time, piece = time[kept], piece[kept]
    starts = np.flatnonzero(np.r_[len(kept) > 0, piece[1:] != piece[:-1]][: len(kept)])
    return Stream(
        time=time,
        xyz=rows["xyz"][kept],
        label=rows["label"][kept],
        starts=starts,
        ends=np.r_[starts[1:], len(kept)].astype(np.int64)[: len(starts)],
        num_double=len(rows) - len(kept),
        num_same_time=int((np.diff(time) == 0).sum()),
    )


def join(acc: Stream, gyro: Stream, rate_hz: int, least: int) -> Iterator[Recording]:
    """Resample both sensors wherever both were recorded without interruption.

    Parameters
    ----------
    acc, gyro : Stream
    rate_hz : int
        Samples a second of the result.
    least : int
        Shorter recordings, in samples, are left out: no window fits in.
    """
    if len(acc.starts) == 0 or len(gyro.starts) == 0:
        return
    period = 1e9 / rate_hz
    gyro_begin, gyro_end = gyro.time[gyro.starts], gyro.time[gyro.ends - 1]
    for start, end in zip(acc.starts, acc.ends, strict=True):
        begin_a, end_a = acc.time[start], acc.time[end - 1]
        low = np.searchsorted(gyro_end, begin_a)
        high = np.searchsorted(gyro_begin, end_a, side="right")
        for k in range(low, high):
            begin, until = max(begin_a, gyro_begin[k]), min(end_a, gyro_end[k])
            n = int((until - begin) / period) + 1
            if n < least:
                continue
            piece = slice(start, end)
            piece_g = slice(gyro.starts[k], gyro.ends[k])
            time = acc.time[piece]
            grid = begin + (np.arange(n) * period).astype(np.int64)
            last = np.maximum(np.searchsorted(time, grid, side="right") - 1, 0)
            yield Recording(
                begin=int(begin),
                samples=np.concatenate(
                    [
                        resample(time, acc.xyz[piece], begin, rate_hz, n),
                        resample(gyro.time[piece_g], gyro.xyz[piece_g], begin, rate_hz, n),
                    ]
                ),
                label=acc.label[piece][last],  # of the last row at or before the sample
            )


def sessions(
    recordings: Sequence[Recording], rate_hz: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Group recordings of one person that overlap in time, whichever device made them.

    Returns
    -------
    session : int64 array (recordings,)
        Number of the group, from 0, in order of time.
    offset : int64 array (recordings,)
        Samples from the beginning of the group to that of the recording.
    """
    begin = np.array([recording.begin for recording in recordings], np.int64)
    length = np.array([recording.samples.shape[1] for recording in recordings])
    end = begin + (length * (1e9 / rate_hz)).astype(np.int64)
    order = np.argsort(begin, kind="stable")
    latest = np.maximum.accumulate(end[order])
    first = np.r_[True, begin[order][1:] >= latest[:-1]]
    number = np.cumsum(first) - 1
    session, offset = np.empty_like(begin), np.empty_like(begin)
    session[order] = number
    start = begin[order][first][number]
    offset[order] = np.round((begin[order] - start) * (rate_hz * 1e-9))
    return session, offset


def resample(
    time: NDArray[np.int64], xyz: NDArray[np.float32], begin: int, rate_hz: int, n: int
) -> NDArray[np.float32]:
    """Bring a piece to a constant rate.

    Rows nearest to the same sample are averaged, times and values alike, which keeps a faster
    sensor's vibrations from showing up as slow movement (a box filter against aliasing) and
    makes one row of several at the same time; a straight line through these averages gives
    the samples, also those to which no row is nearest.

    Parameters
    ----------
    time : int64 array (rows,)
        Ascending, nanoseconds.
    xyz : float32 array (rows, 3)
    begin : int
        Time of the first sample, within the piece.
    rate_hz : int
    n : int
        Samples; the last is within the piece.

    Returns
    -------
    float32 array (3, n)
    """
    at = (time - begin) * (rate_hz * 1e-9)  # in samples
    nearest = np.floor(at + 0.5).astype(np.int64)
    # One row more on either side, so that the line reaches the first and the last sample.
    low = max(np.searchsorted(nearest, 0) - 1, 0)
    high = np.searchsorted(nearest, n) + 1
    at, nearest, values = at[low:high], nearest[low:high], xyz[low:high]
    starts = np.flatnonzero(np.r_[True, nearest[1:] != nearest[:-1]])
    count = np.diff(np.r_[starts, len(nearest)])
    centre = np.add.reduceat(at, starts) / count
    grid = np.arange(n)
    return np.stack(
        [
            np.interp(grid, centre, np.add.reduceat(values[:, axis], starts, dtype=float) / count)
            for axis in range(3)
        ]
    ).astype(np.float32)


def windows(
    recording: Recording, length: int, stride: int, num_classes: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Cut a recording into windows, each labelled by the majority of its samples.

    Parameters
    ----------
    recording : Recording
        Of at least ``length`` samples.
    length, stride : int
        Samples of a window, and from one window to the next.
    num_classes : int

    Returns
    -------
    x : float32 array (windows, 6, length)
    y : int64 array (windows,)
        The lowest class of those that are equally frequent.
    position : int64 array (windows,)
        First sample of each window.
    """
    n = recording.samples.shape[1]
    position = np.arange(0, n - length + 1, stride)
    one_hot = recording.label[:, None] == np.arange(num_classes)
    so_far = np.concatenate([np.zeros((1, num_classes), np.int64), np.cumsum(one_hot, axis=0)])
    y = (so_far[position + length] - so_far[position]).argmax(axis=1)
    cut = sliding_window_view(recording.samples, length, axis=1)[:, ::stride]
    return np.ascontiguousarray(cut.transpose(1, 0, 2)), y, position
