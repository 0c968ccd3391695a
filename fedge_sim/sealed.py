"""Small files that one run keeps for the next: read back only if they are whole."""

import hashlib
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


def write_sealed(file: Path, content: bytes, key: bytes) -> None:
    """Write a file aside and put it in its place, with a checksum in its first line.

    Parameters
    ----------
    file : Path
    content : bytes
    key : bytes
        What the content was made from: the checksum is of both, so a file that was renamed or
        copied in the place of another is not taken for it.
    """
    aside = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        aside.write_bytes(_seal(content, key) + content)
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def read_sealed(file: Path, key: bytes) -> bytes | None:
    """Return what was written with this key; None if nothing was, or a warning says it is damaged.

    Raises
    ------
    OSError
        If the file is there and cannot be read.
    """
    try:
        whole = file.read_bytes()
    except FileNotFoundError:
        return None
    content = whole[len(_seal(b"", key)) :]
    if whole == _seal(content, key) + content:
        return content
    log.warning("%s is damaged; it is made anew", file)
    return None


def _seal(content: bytes, key: bytes) -> bytes:
    """Return the first line of a file."""
    digest = hashlib.sha256(hashlib.sha256(key).digest() + content).hexdigest()
    return f"sha256 {digest}\n".encode()
