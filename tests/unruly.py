"""A ClientApp that misbehaves as a file tells it to; Ray's actors import it."""

import ctypes
import hashlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import torch
from flwr.app import Context, Message

from fedge_sim import records
from fedge_sim.client_app import app as client_app
from fedge_sim.config import Settings, settings_from_json

RULES = "rules.json"


def rule(settings: Settings, **clients: tuple[str, int]) -> None:
    """Tell what a client does wrong when it trains, and how often: ``c3=("raise", 1)``."""
    folder = Path(settings.data.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RULES).write_text(json.dumps(clients))


def tries(settings: Settings, client: int) -> int:
    """Return how often a client began to train."""
    return len(list(Path(settings.data.output_dir).glob(f"try-{client}-*")))


def app(message: Message, context: Context) -> Message:
    """Do as the rules say, then as our ClientApp."""
    config = records.config_of(message)
    if message.metadata.message_type != "train":
        return client_app(message, context)
    client = config[records.CLIENT_ID]
    folder = Path(settings_from_json(config[records.SETTINGS]).data.output_dir)
    (folder / f"try-{client}-{time.time_ns()}-{os.getpid()}").touch()
    rules = json.loads((folder / RULES).read_text())
    what, times = rules.get(f"c{client}", rules.get("all", ("nothing", 0)))
    if len(list(folder.glob(f"try-{client}-*"))) <= times:
        misbehave(what, client)
    return client_app(message, context)


def misbehave(what: str, client: int) -> None:
    """Do something that a client should not."""
    if what == "raise":
        raise RuntimeError("the battery is empty")
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "sleep":
        sleep_for_ever()
    if what == "hold the interpreter":
        ctypes.PyDLL(None).sleep(1000)
    if what == "gpu memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if what == "host memory":
        raise MemoryError
    if what == "delay":  # another one in each process and for each client
        digest = hashlib.sha256(f"{os.getpid()} {client}".encode()).digest()
        time.sleep(digest[0] / 1000)


def sleep_for_ever() -> None:
    """Hang, in a function that a stack dump names."""
    while True:
        time.sleep(1)


def unsendable(message: Message, context: Context) -> Message:
    """Answer with what cannot be sent to another process."""
    reply = client_app(message, context)
    if message.metadata.message_type == "train":
        reply.__dict__["lock"] = threading.Lock()
    return reply
