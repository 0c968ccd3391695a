"""The clients' states, in one file: memory does not grow with the number of clients.

A client has two slots, so that a run that ends within a round can go on from the last committed
one: what is written since then never takes the place of what was there. Which slot is whose newest,
and the checksum of what is in it, is known to the run and its checkpoint, and not to the file.
"""

import json
import os
import threading
import zlib
from collections.abc import Mapping
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from flwr.app import ArrayRecord
from numpy.typing import NDArray

from fedge_sim import records
from fedge_sim.errors import CheckpointError, StateError

Layout: TypeAlias = list[list[Any]]  # name, dtype and shape of each array, as JSON has them


class StateFile:
    """One ArrayRecord for each client: ``clients.bin``, and ``layout.json`` beside it.

    The file has two slots for each client, in their order. All records have the layout (names,
    dtypes, shapes) of the first one that is written. Different clients may be read and written on
    different threads. What is written outlasts the process; nothing waits for the disk.

    Parameters
    ----------
    folder : Path
        Made when the first record is written.
    num_clients : int
    saved : mapping, optional
        What :meth:`state` gave for the round to go on from; what was written later is dropped.

    Raises
    ------
    CheckpointError
        If a record that was saved is not there, or is not what was written.
    """

    def __init__(
        self, folder: Path, num_clients: int, saved: Mapping[str, Any] | None = None
    ) -> None:
        self._file, self._layout_file = folder / "clients.bin", folder / "layout.json"
        self._committed = 0
        # Of both slots of each client: the round in which it was written, 0 if it is empty.
        self._rounds = np.zeros((num_clients, 2), np.int64)
        self._sums = np.zeros((num_clients, 2), np.int64)
        self._layout: Layout | None = None  # until the first record is written
        self._slot = 0  # bytes of one
        self._stream: Any = None
        self._first = threading.Lock()
        if saved is not None:
            self._committed = saved["round"]
            if saved["layout"] is not None:
                self._open(saved)

    def read(self, client: int) -> ArrayRecord | None:
        """Return a client's newest record; None if it has none.

        Raises
        ------
        StateError
            If it is not what was written.
        """
        slot = int(self._rounds[client].argmax())
        if not self._rounds[client, slot]:
            return None
        try:
            data, at = self._get(client, slot), 0
        except StateError as error:
            raise StateError(
                f"{error}; go on from the checkpoint (--resume), or start a new run"
            ) from None
        arrays: dict[str, NDArray[Any]] = {}
        for name, dtype, shape in self._layout or ():
            end = at + _num_bytes(dtype, shape)
            arrays[name], at = data[at:end].view(dtype).reshape(shape), end
        return records.to_record(arrays)

    def write(self, client: int, record: ArrayRecord, flat_round: int) -> None:
        """Replace a client's record; that of the last committed round is kept until the next.

        Parameters
        ----------
        client : int
        record : ArrayRecord
        flat_round : int
            The round that the record is of, later than the last committed one.

        Raises
        ------
        StateError
            If the record has another layout than the first, or the disk is full.
        """
        if flat_round <= self._committed:
            raise ValueError(f"round {flat_round} is not after the committed {self._committed}")
        arrays = records.to_arrays(record)
        layout = [[name, a.dtype.str, list(a.shape)] for name, a in arrays.items()]
        try:
            with self._first:
                if self._layout is None:
                    self._create(layout)
            for own, others in zip_longest(layout, self._layout or ()):
                if own != others:
                    raise StateError(f"the state of client {client} has {own}, others {others}")
            rounds = self._rounds[client]
            slot = 1 - int(np.where(rounds <= self._committed, rounds, -1).argmax())
            data = b"".join(array.tobytes() for array in arrays.values())
            rounds[slot] = 0  # until all of it is there
            self._put(data, self._start_of(client, slot))
            self._sums[client, slot], rounds[slot] = zlib.crc32(data), flat_round
        except OSError as error:
            raise StateError(f"{self._file}: cannot be written: {error.strerror}") from error

    def state(self, flat_round: int) -> dict[str, Any]:
        """Return what the checkpoint of a round must know: each client's slot, round, checksum."""
        newest = self._rounds.argmax(axis=1)
        own = np.arange(len(newest)), newest
        slots = np.stack([newest, self._rounds[own], self._sums[own]], axis=1)
        return {"round": flat_round, "layout": self._layout, "slots": slots}

    def commit(self, flat_round: int) -> None:
        """From now on keep what each client had in this round: a run can go on from there."""
        self._committed = flat_round

    def close(self) -> None:
        """Close the file; the records stay in it."""
        if self._stream is not None:
            self._stream.close()

    # ------------------------------------------------------------------ inside

    def _open(self, saved: Mapping[str, Any]) -> None:
        """Open the files that a checkpoint speaks of, and look at every record."""
        self._layout = saved["layout"]
        self._slot = _slot_size(saved["layout"])
        try:
            with suppress(ValueError, RecursionError):
                form = json.loads(self._layout_file.read_text(encoding="utf-8"))
                if form == [len(self._rounds), self._layout]:
                    self._stream = self._file.open("r+b", buffering=0)
            if self._stream is None:
                raise StateError(f"{self._layout_file}: is not what the run wrote")
            for client, (slot, *known) in enumerate(saved["slots"].tolist()):
                self._rounds[client, slot], self._sums[client, slot] = known
                if self._rounds[client, slot]:
                    self._get(client, slot)
        except (OSError, StateError) as error:
            self.close()
            problem = f"what clients keep is not what the checkpoint was made with: {error}"
            raise CheckpointError(f"{problem}; put it back, or start a new run") from None

    def _create(self, layout: Layout) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._slot = _slot_size(layout)
        self.close()  # after a try that failed
        self._stream = self._file.open("w+b", buffering=0)
        os.ftruncate(self._stream.fileno(), self._rounds.size * self._slot)  # takes no room yet
        aside = self._layout_file.with_suffix(".tmp")
        aside.write_text(json.dumps([len(self._rounds), layout]) + "\n", encoding="utf-8")
        aside.replace(self._layout_file)
        self._layout = layout

    def _start_of(self, client: int, slot: int) -> int:
        return (2 * client + slot) * self._slot

    def _get(self, client: int, slot: int) -> NDArray[np.uint8]:
        """Return what is in a slot, if that is what was written."""
        data, start, done = np.empty(self._slot, np.uint8), self._start_of(client, slot), 0
        try:
            while more := os.preadv(self._stream.fileno(), [data[done:].data], start + done):
                done += more
        except OSError as error:
            raise StateError(f"{self._file}: cannot be read: {error.strerror}") from None
        if done < self._slot or zlib.crc32(data.data) != self._sums[client, slot]:
            raise StateError(
                f"{self._file}: the state of client {client} is not what was written in round "
                f"{self._rounds[client, slot]}"
            )
        return data

    def _put(self, data: bytes, start: int) -> None:
        # Through the file: a full disk is an error here, and a signal in a mapping.
        while data:
            done = os.pwrite(self._stream.fileno(), data, start)
            data, start = data[done:], start + done


def _slot_size(layout: Layout) -> int:
    return sum(_num_bytes(dtype, shape) for _, dtype, shape in layout)


def _num_bytes(dtype: str, shape: list[int]) -> int:
    return np.dtype(dtype).itemsize * int(np.prod(shape, dtype=np.int64))
