"""The scripts that make or download HHAR's files."""

import importlib.util
import io
import re
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import polars as pl
import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
COLUMNS = ["Index", "Arrival_Time", "Creation_Time", "x", "y", "z", "User", "Model", "Device", "gt"]
FILES = [f"{kind}_{s}.csv" for kind in ("Phones", "Watch") for s in ("accelerometer", "gyroscope")]
ACTIVITIES = {"bike", "sit", "stand", "walk", "stairsup", "stairsdown"}
NO_GYROSCOPE = ["samsungold_1", "samsungold_2"]
RATES = {"nexus4": 200, "s3": 150, "s3mini": 100, "samsungold": 50, "gear": 100, "lgwatch": 200}


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = load("make_hhar_csv").make


def script(name: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / f"{name}.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


# ------------------------------------------------------------------ made files


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    written = make(folder, 200_000, seed=42)
    assert written == sum(len(pl.read_csv(file)) for file in folder.iterdir())
    assert written == pytest.approx(200_000, rel=0.05)
    return folder


def streams(file: Path) -> list[pl.DataFrame]:
    return pl.read_csv(file).partition_by("User", "Device", maintain_order=True)


@pytest.mark.parametrize("name", FILES)
def test_form_of_a_made_file(made, name):
    header, *lines = (made / name).read_text().splitlines()
    assert header.split(",") == COLUMNS
    plain = re.compile(r"\d+,\d{13},\d+(,-?\d+\.\d+){3},[a-i],\w+,\w+_[12],\w+")
    assert all(plain.fullmatch(line) for line in lines)
    frame = pl.read_csv(made / name)
    assert set(frame["User"]) == set("abcdefghi")
    assert set(frame["gt"]) == {*ACTIVITIES, "null"}
    models = {"gear", "lgwatch"} if name.startswith("Watch") else set(RATES) - {"gear", "lgwatch"}
    assert set(frame["Model"]) == models - ({"samsungold"} if "Phones_gyro" in name else set())


@pytest.mark.parametrize("name", FILES)
def test_streams_of_a_made_file(made, name):
    frame = pl.read_csv(made / name)
    stream_id = pl.struct("User", "Device").rle_id()
    assert frame.select(stream_id.n_unique()).item() == len(streams(made / name))  # contiguous
    exchanged = 0
    for stream in streams(made / name):
        assert set(stream["gt"]) == {*ACTIVITIES, "null"}
        jumps = stream["Index"].diff()
        exchanged += (jumps < 0).sum()
        assert (jumps == -1).sum() == (jumps < 0).sum() < 0.02 * len(stream)
        ordered = stream.sort("Index")
        assert ordered["Index"].to_list() == list(range(len(stream)))
        assert ordered["Arrival_Time"].is_sorted()
        assert ordered["Creation_Time"].is_sorted()
        assert ordered["Arrival_Time"].is_duplicated().any()
        rate = 1e9 / ordered["Creation_Time"].diff().median()
        assert rate == pytest.approx(RATES[stream["Model"][0]], rel=0.02)
        # six recordings: an activity of at least 2 s, then "null", then a gap
        gaps = (ordered["Arrival_Time"].diff() > 3000).fill_null(True)
        assert (ordered["Arrival_Time"].diff().filter(~gaps) < 300).all()
        recordings = ordered.with_columns(recording=gaps.cum_sum()).partition_by("recording")
        assert len(recordings) == 6
        for recording in recordings:
            activity, nothing = recording["gt"].rle().struct.unnest().iter_rows()
            assert activity[1] in ACTIVITIES
            assert nothing[1] == "null"
            assert activity[0] >= 1.9 * rate
    assert exchanged > 0


@pytest.mark.parametrize("kind", ["Phones", "Watch"])
def test_sensors_of_a_device_share_its_clock(made, kind):
    def recordings(sensor: str) -> pl.DataFrame:
        ahead = pl.col("Creation_Time") / 1e6 - pl.col("Arrival_Time")
        return (
            pl.read_csv(made / f"{kind}_{sensor}.csv")
            .filter(pl.col("gt") != "null")
            .group_by("User", "Device", "gt")
            .agg(ahead.median().alias("ahead"), pl.len(), pl.col("Creation_Time"))
        )

    keys = ["User", "Device", "gt"]
    both = recordings("accelerometer").join(recordings("gyroscope"), on=keys, suffix="_gyro")
    assert len(both) == 9 * 6  # at this size, one device with both sensors each
    assert ((both["ahead"] - both["ahead_gyro"]).abs() < 50).all()  # ms
    difference = (both["len"].cast(float) - both["len_gyro"]).abs() / both["len"]
    assert 0 < difference.max() < 0.05
    instants = both.select(pl.col("Creation_Time").list.set_intersection("Creation_Time_gyro"))
    assert instants["Creation_Time"].list.len().max() < 5
    per_device = both.group_by("User", "Device").agg(pl.col("ahead").sort().diff().min())
    if kind == "Watch":
        assert both["ahead"].max() < 0  # from boot
        assert (per_device["ahead"] > 900).all()  # jumps by a second or more
    else:
        assert (both["ahead"].abs() < 60_000).all()  # a Unix time, seconds wrong
        assert (per_device["ahead"] < 10).all()


def test_movement_depends_on_the_activity(made):
    def restlessness(sensor: str) -> dict[str, float]:
        frame = pl.read_csv(made / f"Phones_{sensor}.csv")
        return dict(frame.group_by("gt").agg(pl.col("z").std()).iter_rows())

    acceleration, rotation = restlessness("accelerometer"), restlessness("gyroscope")
    assert acceleration["stand"] < acceleration["bike"] < acceleration["stairsdown"]
    assert rotation["sit"] < rotation["stairsup"] < rotation["bike"]


def test_only_samsungold_has_no_gyroscope(tmp_path):
    make(tmp_path, 900_000, seed=1, watches=False)  # enough for all devices
    assert sorted(file.name for file in tmp_path.iterdir()) == FILES[:2]
    accelerometer, gyroscope = (
        set(pl.read_csv(tmp_path / name).select("User", "Device").unique().iter_rows())
        for name in FILES[:2]
    )
    assert len(accelerometer) == 9 * 8
    assert sorted({device for _, device in accelerometer - gyroscope}) == NO_GYROSCOPE
    assert len(gyroscope) == 9 * 6


def test_same_seed_same_bytes(tmp_path):
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        make(tmp_path / name, 60_000, seed, watches=False)
    for file in FILES[:2]:
        one, same, other = ((tmp_path / n / file).read_bytes() for n in ("one", "same", "other"))
        assert one == same
        assert one != other


def test_too_few_rows(tmp_path):
    done = script("make_hhar_csv", tmp_path / "out", "--rows", 1000)
    assert done.returncode == 2
    least = int(re.search(r"at\s+least\W+(\d+)", done.stderr)[1])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="too few"):
        make(tmp_path / "out", least - 10, seed=0)
    make(tmp_path / "out", least, seed=0)


# ------------------------------------------------------------ downloaded files


def zipped(entries: dict[str, str | bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return data.getvalue()


def uci_archive(files: list[str] = FILES) -> bytes:
    """Like UCI's: an archive of archives, of which one has other files of the same names."""
    folder = "Activity recognition exp"
    entries = {f"{folder}/{name}": f"the real {name}" for name in files}
    still = {f"Still exp/{name}": "still" for name in FILES}
    return zipped(
        {
            f"{folder}.zip": zipped({**entries, f"{folder}/readme.txt": "x", "../evil.csv": "x"}),
            "__MACOSX/._Activity recognition exp.zip": "not an archive",
            "Still exp.zip": zipped(still),
        }
    )


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_download_of_nested_archives(tmp_path):
    archive = tmp_path / "hhar.zip"
    archive.write_bytes(uci_archive())
    folder = tmp_path / "my data"
    done = script("download_hhar", folder, "--url", archive.as_uri())
    assert done.returncode == 0, done.stderr
    assert f"make run-hhar DATA='{folder}'" in done.stdout
    assert everything_in(folder) == FILES
    assert len(everything_in(tmp_path)) == len(["hhar.zip", "my data", *FILES])
    assert all((folder / name).read_text() == f"the real {name}" for name in FILES)

    archive.unlink()
    again = script("download_hhar", folder, "--url", archive.as_uri())
    assert again.returncode == 0, again.stderr
    assert "already" in again.stdout
    assert "make run-hhar" in again.stdout


class Unreliable(BaseHTTPRequestHandler):
    """Knows no page but "/cut", where it hangs up before the end."""

    def do_GET(self) -> None:
        if self.path != "/cut":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        self.wfile.write(uci_archive())
        return None

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Unreliable) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def damaged() -> bytes:
    data = bytearray(zipped({name: name * 1000 for name in FILES}))
    data[100:110] = bytes(10)
    return bytes(data)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (zipped({"readme.txt": "x"}), r"no Phones_accelerometer.csv, .* in this archive"),
        (uci_archive(FILES[:3]), r"no Watch_gyroscope.csv in this archive"),
        (b"<html>moved</html>", r"not a zip archive"),
        (damaged(), r"not a zip archive, or a damaged one"),
    ],
    ids=["no-file", "a-file-missing", "not-a-zip", "damaged"],
)
def test_unusable_archive(tmp_path, content, problem):
    archive = tmp_path / "hhar.zip"
    archive.write_bytes(content)
    check_failure(tmp_path, archive.as_uri(), problem)
    assert everything_in(tmp_path) == ["hhar.zip"]


@pytest.mark.parametrize(
    ("path", "problem"), [("/cut", "the connection was cut"), ("/none", "HTTP 404 Not Found")]
)
def test_unreliable_server(tmp_path, server, path, problem):
    check_failure(tmp_path, server + path, problem)
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x.zip", "file:///no/such.zip", "no-address"])
def test_unreachable_address(tmp_path, url):
    check_failure(tmp_path, url, "cannot be reached|unknown url type")
    assert everything_in(tmp_path) == []


def test_a_failure_keeps_what_was_there(tmp_path):
    (tmp_path / "hhar").mkdir()
    (tmp_path / "hhar" / FILES[0]).write_text("old")
    check_failure(tmp_path, "file:///no/such.zip", "cannot be reached")
    assert everything_in(tmp_path) == ["hhar", f"hhar/{FILES[0]}"]


def check_failure(tmp_path: Path, url: str, problem: str) -> None:
    done = script("download_hhar", tmp_path / "hhar", "--url", url)
    assert done.returncode == 1
    assert re.fullmatch(rf"error: .*({problem}).*\n", done.stderr)  # one line
    assert done.stdout == ""
