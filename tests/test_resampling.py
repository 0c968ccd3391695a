"""From the rows of two sensors to windows: what must hold, by hand and for any rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge_sim.data.resampling import (
    MAX_GAP,
    ROW,
    UNKNOWN,
    Recording,
    Stream,
    clean,
    join,
    resample,
    sessions,
    windows,
)

MS = 1_000_000


def stream(time_ms, *, creation=None, xyz=None, label=0) -> np.ndarray:
    rows = np.empty(len(time_ms), ROW)
    rows["arrival"] = np.asarray(time_ms) * MS
    rows["creation"] = rows["arrival"] if creation is None else creation
    rows["xyz"] = np.zeros((len(rows), 3)) if xyz is None else xyz
    rows["label"] = label
    return rows


def pieces(found: Stream) -> list[tuple[int, int]]:
    return [
        (int(found.time[s] // MS), int(found.time[e - 1] // MS))
        for s, e in zip(found.starts, found.ends, strict=True)
    ]


def test_pieces_end_at_gaps():
    found = clean(stream([0, 10, 20, 521, 531, 1031, 1532]))
    assert pieces(found) == [(0, 20), (521, 1031), (1532, 1532)]


def test_the_sensors_clock_smooths_the_recorders():
    """Delays are 0 or more: the least of them is the shift between the clocks."""
    true = np.arange(0, 3000, 10)
    delay = np.random.default_rng(0).integers(0, 40, len(true))
    delay[7] = 0
    arrival = np.maximum.accumulate(true + delay)
    found = clean(stream(arrival, creation=true * MS + 123_456_789))
    np.testing.assert_array_equal(found.time, true * MS)
    assert pieces(found) == [(0, 2990)]


def test_without_a_sensors_clock_the_recorders_is_taken():
    creation = np.arange(300) * 10 * MS
    creation[50] = UNKNOWN
    arrival = np.arange(300) * 10 + np.arange(300) % 3
    found = clean(stream(arrival, creation=creation))
    np.testing.assert_array_equal(found.time, np.sort(arrival) * MS)


def test_a_sensors_clock_that_runs_wrong_is_not_believed():
    arrival = np.arange(300) * 10
    found = clean(stream(arrival, creation=np.arange(300) * 15 * MS))  # 1.5 s too much
    np.testing.assert_array_equal(found.time, arrival * MS)


def test_a_jump_of_either_clock_is_a_gap():
    arrival = np.arange(600) * 10
    creation = arrival * MS
    creation[300:] += 2_000 * MS
    assert pieces(clean(stream(arrival, creation=creation))) == [(0, 2990), (3000, 5990)]


def test_rows_of_one_arrival_are_sorted_by_the_sensors_clock():
    creation = np.array([0, 20, 10, 30, 40]) * MS
    rows = stream([50] * 5, creation=creation, xyz=np.arange(15).reshape(5, 3))
    found = clean(rows)
    assert found.xyz[:, 0].tolist() == [0, 6, 3, 9, 12]


def test_a_clock_that_was_set_back_gives_no_mixed_samples():
    """Rows at times that were recorded already are left out and counted, not woven in."""
    first, second = np.arange(0, 10_000, 10), np.arange(5_000, 12_000, 10)
    xyz = np.repeat([[1.0] * 3, [2.0] * 3], [len(first), len(second)], axis=0)
    found = clean(stream(np.r_[first, second], xyz=xyz))
    assert found.num_double == 500
    assert pieces(found) == [(0, 9990), (10_000, 11_990)]
    assert (found.xyz[:, 0] == np.repeat([1.0, 2.0], [1000, 200])).all()


def test_recordings_in_any_order_and_shuffled_rows_are_put_right():
    times = np.r_[np.arange(0, 3000, 10), np.arange(5000, 8000, 10), np.arange(9000, 9500, 10)]
    rows = stream(times, xyz=np.repeat(times[:, None], 3, axis=1))
    expected = clean(rows)
    turned = clean(np.concatenate([rows[300:600], rows[600:], rows[:300]]))
    shuffled = clean(np.random.default_rng(0).permutation(rows))
    for found in (turned, shuffled):
        assert found.num_double == 0
        np.testing.assert_array_equal(found.time, expected.time)
        np.testing.assert_array_equal(found.xyz, expected.xyz)
        np.testing.assert_array_equal(found.starts, expected.starts)


def test_resampling_by_hand():
    # 2 samples a second: at 0, 0.5 and 1 s; rows nearest to each are averaged, times too
    time = np.array([0, 100, 500, 900, 1100]) * MS
    xyz = np.array([[0], [1], [5], [9], [11]]) * np.array([1.0, 10.0, -1.0])
    samples = resample(time, xyz.astype(np.float32), 0, 2, 3)
    # averages: (0.05 s, 0.5), (0.5 s, 5), (1.0 s, 10); nothing is before 0.05 s
    np.testing.assert_allclose(samples[0], [0.5, 5.0, 10.0], rtol=1e-6)
    np.testing.assert_allclose(samples[1], samples[0] * 10, rtol=1e-6)
    np.testing.assert_allclose(samples[2], -samples[0], rtol=1e-6)


def test_slow_rows_are_joined_by_straight_lines():
    time = np.arange(0, 1001, 100) * MS  # 10 a second
    xyz = (np.arange(11)[:, None] * np.ones(3)).astype(np.float32)
    np.testing.assert_allclose(
        resample(time, xyz, 0, 50, 51)[0], np.arange(51) / 5, rtol=1e-5, atol=1e-6
    )


def test_a_fast_sensors_vibration_does_not_become_slow_movement():
    time = np.arange(0, 4_000_000_000, 5 * MS)  # 200 a second
    wave = np.sin(2 * np.pi * 49 * time / 1e9)  # at 50 a second, this looks like 1 a second
    xyz = np.repeat(wave[:, None], 3, axis=1).astype(np.float32)
    assert np.abs(resample(time, xyz, 0, 50, 200)[:, 1:-1]).max() < 0.05


def test_joining_needs_both_sensors():
    acc = clean(stream(np.r_[np.arange(0, 5000, 10), np.arange(6000, 9000, 10)]))
    gyro = clean(stream(np.r_[np.arange(1000, 7500, 10), np.arange(8500, 9000, 10)]))
    found = [r.samples.shape[1] for r in join(acc, gyro, 50, 1)]
    assert found == [200, 75, 25]
    assert [r.samples.shape[1] for r in join(acc, gyro, 50, 100)] == [200]
    assert list(join(acc, clean(stream([])), 50, 1)) == []


@pytest.mark.parametrize(("acc_start", "gyro_start"), [(1000, 1333), (1333, 1000)])
def test_both_sensors_and_the_labels_stand_at_one_time(acc_start, gyro_start):
    """Every reading says when it was made, so every sample must say its own time."""
    rng = np.random.default_rng(0)
    own = {}
    for name, start, step in (("acc", acc_start, 5), ("gyro", gyro_start, 12)):
        made = np.sort(
            np.arange(start, 9000, step) + rng.integers(-2, 3, (9000 - start - 1) // step + 1)
        )
        seconds = made[:, None] / 1000 * np.ones(3)
        own[name] = clean(stream(made, xyz=seconds, label=made // 1000 % 6))
    (recording,) = join(own["acc"], own["gyro"], 50, 100)
    begin = max(of.time[0] for of in own.values()) / 1e9
    assert recording.begin / 1e9 == begin
    expected = begin + np.arange(recording.samples.shape[1]) / 50
    for channel in recording.samples:
        np.testing.assert_allclose(channel[1:-1], expected[1:-1], atol=1e-3)
        np.testing.assert_allclose(channel, expected, atol=0.011)
    between = np.abs(expected % 1 - 0.5) < 0.49  # not within 10 ms of a change
    assert (recording.label == expected.astype(int) % 6)[between].all()
    last_row = np.searchsorted(own["acc"].time / 1e9, expected, side="right") - 1
    np.testing.assert_array_equal(recording.label, own["acc"].label[last_row])


def test_sessions_by_hand():
    def recording(begin_s, seconds):
        samples = round(seconds * 50)
        label = np.zeros(samples, np.int8)
        return Recording(round(begin_s * 1e9), np.zeros((6, samples), np.float32), label)

    made = [(10, 5), (0, 4), (3, 2), (4.5, 1), (15, 3), (14.9, 1)]
    session, offset = sessions([recording(*times) for times in made], 50)
    # 0 to 4 and 3 to 5 and 4.5 to 5.5 overlap; 10 to 15, 14.9 to 15.9 and 15 to 18 do
    assert session.tolist() == [1, 0, 0, 0, 1, 1]
    assert offset.tolist() == [0, 0, 150, 225, 250, 245]


def test_windows_by_hand():
    label = np.array([0, 0, 1, 1, 1, 2, 2, 2], np.int8)
    recording = Recording(0, np.arange(48, dtype=np.float32).reshape(6, 8), label)
    x, y, position = windows(recording, 4, 2, 6)
    assert position.tolist() == [0, 2, 4]
    assert y.tolist() == [0, 1, 2]  # two of each in the first: the lower class
    np.testing.assert_array_equal(x[1], recording.samples[:, 2:6])


@st.composite
def times(draw):
    """Times of one sensor in ms: runs of rows with jitter, gaps, steps back and repeats."""
    now, found = draw(st.integers(1_000_000, 2_000_000)), []
    for _ in range(draw(st.integers(1, 4))):
        step = draw(st.sampled_from([5, 10, 20, 70, 400]))
        for jitter in draw(st.lists(st.integers(-6, 6), max_size=120)):
            found.append(max(0, now + jitter))
            now += step
        now += draw(st.sampled_from([0, 300, 501, 4000, -700, -20_000]))
    return found


@settings(max_examples=60)
@given(times(), times(), st.booleans(), st.randoms(use_true_random=False), st.data())
def test_invariants_of_recordings(acc_ms, gyro_ms, shuffle, random, data):
    streams = []
    for own in (acc_ms, gyro_ms):
        if shuffle:
            random.shuffle(own)
        label = np.array(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4)))
        # every reading says when it was made, so a sample shows which rows it came from
        seconds = np.asarray(own, float)[:, None] / 1000 * np.ones(3)
        rows = stream(own, xyz=seconds, label=np.resize(label, len(own)))
        found = clean(rows)
        assert (np.diff(found.time) >= 0).all()
        assert len(found.time) + found.num_double == len(own)
        assert set(found.time // MS) <= set(own)
        for start, end in zip(found.starts, found.ends, strict=True):
            assert (np.diff(found.time[start:end]) <= MAX_GAP).all()
        streams.append(found)
    acc, gyro = streams
    for recording in join(acc, gyro, 50, 10):
        x, y, position = windows(recording, 10, 5, 6)
        for sensor, of in ((x[:, :3], acc), (x[:, 3:], gyro)):
            starts, ends = of.time[of.starts] / 1e9, of.time[of.ends - 1] / 1e9
            for window in sensor:
                inside = (window.min() >= starts - 0.02) & (window.max() <= ends + 0.02)
                assert inside.any(), "a window is made of rows on both sides of a gap"
                assert np.ptp(window) <= 10 / 50 + 0.5
        for k, p in enumerate(position):
            counts = np.bincount(recording.label[p : p + 10], minlength=6)
            assert counts[y[k]] == counts.max()
