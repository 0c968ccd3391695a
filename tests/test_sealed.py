"""What is kept from run to run is taken only as it was written."""

import hashlib
import logging

import numpy as np
import pytest

from fedge_sim.sealed import read_sealed, write_sealed

KEY = b"what it is of"


def damaged(whole: bytes, rng: np.random.Generator) -> bytes:
    """Flip a bit, cut the end off, set a stretch to zero, or exchange two of its parts."""
    content = bytearray(whole)
    begin, end = sorted(rng.choice(len(whole), 2, replace=False).tolist())
    match rng.integers(4):
        case 0:
            content[begin] ^= 1 << int(rng.integers(8))
        case 1:
            del content[begin:]
        case 2:
            content[begin:end] = bytes(end - begin)
        case 3:
            content = content[end:] + content[begin:end] + content[:begin]
    return bytes(content) if content != whole else whole[:-1]


@pytest.mark.parametrize("content", [b"", b"{}", np.arange(500).tobytes(), bytes(300)])
def test_a_damaged_file_is_never_taken(tmp_path, caplog, content):
    logging.getLogger("fedge_sim").propagate = True
    file = tmp_path / "x.sealed"
    write_sealed(file, content, KEY)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    other = hashlib.sha256(hashlib.sha256(b"another").digest() + content).hexdigest().encode()
    damages = [damaged(whole, rng) for _ in range(500)]
    damages += [b"", b"no such file", whole + b"x", content, b"sha256 " + other + b"\n" + content]
    for damage in damages:
        assert damage != whole
        file.write_bytes(damage)
        caplog.clear()
        assert read_sealed(file, KEY) is None
        assert caplog.text.count("x.sealed is damaged; it is made anew") == 1
    write_sealed(file, content, KEY)
    assert file.read_bytes() == whole
    caplog.clear()
    assert read_sealed(file, KEY) == content
    assert read_sealed(file, b"another") is None
    assert "damaged" in caplog.text


def test_what_was_never_written_is_not_damaged(tmp_path, caplog):
    logging.getLogger("fedge_sim").propagate = True
    assert read_sealed(tmp_path / "x.sealed", KEY) is None
    assert not caplog.records
    with pytest.raises(OSError, match="directory"):
        read_sealed(tmp_path, KEY)
