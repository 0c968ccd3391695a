"""A ClientApp that misbehaves as a file tells it to; Ray's actors import it."""

import ctypes
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from flwr.app import Context, Message

from fedge_sim import client_app as ours
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


def cohorts(settings: Settings) -> list[list[int]]:
    """Return the cohorts that were trained, largest first; each as its clients."""
    files = Path(settings.data.output_dir).glob("cohort-*")
    return sorted((json.loads(file.read_text()) for file in files), key=len, reverse=True)


def app(message: Message, context: Context) -> Message:
    """Do as the rules say, then as our ClientApp."""
    obey(message)
    return client_app(message, context)


def answer_together(messages: Sequence[Message], context: Context) -> list[Message]:
    """Do as the rules say to each client, then as our ClientApp does with a cohort."""
    configs = [records.config_of(message) for message in messages]
    if messages[0].metadata.message_type == "train":
        folder = Path(settings_from_json(configs[0][records.SETTINGS]).data.output_dir)
        clients = [config[records.CLIENT_ID] for config in configs]
        (folder / f"cohort-{time.time_ns()}-{os.getpid()}").write_text(json.dumps(clients))
    for message in messages:
        obey(message)
    return ours.answer_together(messages, context)


def obey(message: Message) -> None:
    """Do to a client that trains what the rules say."""
    config = records.config_of(message)
    if message.metadata.message_type != "train":
        return
    client = config[records.CLIENT_ID]
    folder = Path(settings_from_json(config[records.SETTINGS]).data.output_dir)
    (folder / f"try-{client}-{time.time_ns()}-{os.getpid()}").touch()
    rules = json.loads((folder / RULES).read_text())
    what, times = rules.get(f"c{client}", rules.get("all", ("nothing", 0)))
    if len(list(folder.glob(f"try-{client}-*"))) <= times:
        misbehave(what, client)


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
