"""A ClientApp that misbehaves as a file tells it to; Ray's actors import it."""

import ctypes
import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from flwr.app import Array, ConfigRecord, Context, Message, MetricRecord

from fedge_sim import client_app as ours
from fedge_sim import records
from fedge_sim.client_app import app as client_app
from fedge_sim.config import Settings, settings_from_json

RULES = "rules.json"


def rule(settings: Settings, **clients: tuple[str, int]) -> None:
    """Tell what a client does wrong when it trains, and how often: ``c3=("raise", 1)``.

    ``e3`` is about its evaluations; what else it may do is to spoil a reply: :data:`SPOILED`.
    """
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
    """Do as the rules say, then as our ClientApp; spoil its reply if they say so."""
    what = obey(message)
    return spoil(what, client_app(message, context))


def answer_together(messages: Sequence[Message], context: Context) -> list[Message]:
    """Do as the rules say to each client, then as our ClientApp does with a cohort."""
    configs = [records.config_of(message) for message in messages]
    if messages[0].metadata.message_type == "train":
        folder = Path(settings_from_json(configs[0][records.SETTINGS]).data.output_dir)
        clients = [config[records.CLIENT_ID] for config in configs]
        (folder / f"cohort-{time.time_ns()}-{os.getpid()}").write_text(json.dumps(clients))
    whats = [obey(message) for message in messages]
    return list(map(spoil, whats, ours.answer_together(messages, context)))


def obey(message: Message) -> str:
    """Do to a client what the rules say, and return it."""
    config, kind = records.config_of(message), message.metadata.message_type
    if kind not in ("train", "evaluate"):
        return ""
    client = config[records.CLIENT_ID]
    folder = Path(settings_from_json(config[records.SETTINGS]).data.output_dir)
    rules = json.loads((folder / RULES).read_text())
    if kind == "evaluate":
        return rules.get(f"e{client}", ("", 0))[0]
    (folder / f"try-{client}-{time.time_ns()}-{os.getpid()}").touch()
    what, times = rules.get(f"c{client}", rules.get("all", ("nothing", 0)))
    if len(list(folder.glob(f"try-{client}-*"))) > times:
        return ""
    misbehave(what, client)
    return what


def misbehave(what: str, client: int) -> None:
    """Do something that a client should not."""
    if what == "raise":
        raise RuntimeError("the battery is empty")
    if what == "exit":
        sys.exit(0)
    if what == "interrupt":
        raise KeyboardInterrupt
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "sleep":
        sleep_for_ever()
    if what == "take 100 s":
        time.sleep(100)
    if what == "hold the interpreter":
        ctypes.PyDLL(None).sleep(1000)
    if what == "gpu memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if what == "host memory":
        raise MemoryError
    if what == "delay":  # another one in each process and for each client
        digest = hashlib.sha256(f"{os.getpid()} {client}".encode()).digest()
        time.sleep(digest[0] / 1000)


def spoil(what: str, reply: Message) -> Message:
    """Return a reply as the rules would have it."""
    if what in SPOILED:
        SPOILED[what](reply.content)
    return reply


def _change(change, record="arrays"):
    """Return what puts another array in the place of a reply's first."""

    def spoil(content):
        arrays = content.array_records[record]
        name = next(iter(arrays))
        arrays[name] = Array(np.asarray(change(records._from_flower(arrays[name]))))

    return spoil


def _drop(record):
    return lambda content: content.pop(record)


def _say(key, value):
    return lambda content: content.metric_records["metrics"].update({key: value})


def _drop_array(content, record="arrays"):
    del content.array_records[record][next(iter(content.array_records[record]))]


def _damage(content):
    arrays = content.array_records["arrays"]
    name = next(iter(arrays))
    whole = arrays[name]
    arrays[name] = Array(whole.dtype, whole.shape, whole.stype, whole.data[:-3])


def _lie(content):  # a dtype and a shape that its bytes have not
    arrays = content.array_records["arrays"]
    name = next(iter(arrays))
    other = Array(np.zeros(3))
    arrays[name] = Array(arrays[name].dtype, arrays[name].shape, other.stype, other.data)


SPOILED = {
    "another shape": _change(lambda a: np.concatenate([a, a])),
    "a shape that broadcasts": _change(lambda a: a.ravel()[:1]),
    "float64": _change(lambda a: a.astype(np.float64)),
    "integers": _change(lambda a: a.astype(np.int64)),
    "text in the place of an array": _change(lambda a: np.full(a.shape, "x")),
    "an array too few": _drop_array,
    "an array too many": lambda c: c.array_records["arrays"].update(more=Array(np.zeros(2))),
    "half an array": _damage,
    "another array than it says": _lie,
    "no model": _drop("arrays"),
    "no metrics": _drop("metrics"),
    "text in the place of metrics": lambda c: c.update(metrics=ConfigRecord({"loss": "low"})),
    "no metric": lambda c: c.update(metrics=MetricRecord()),
    "a list of examples": _say("num-examples", [1, 2]),
    "negative examples": _say("num-examples", -3),
    "no examples": _say("num-examples", 0),
    "fractional examples": _say("num-examples", 2.5),
    "examples that are no number": _say("num-examples", float("nan")),
    "too many examples": _say("num-examples", 10**400),
    "negative examples held out": _say("held-out-num-examples", -3),
    "no class counts": lambda c: c.metric_records["metrics"].pop("class-counts"),
    "a class too few": lambda c: c.metric_records["metrics"]["class-counts"].pop(),
    "examples of no class": _say("class-counts", [1] * 10),
    "a negative loss": _say("loss", -1.0),
    "a loss that is not finite": _say("loss", float("nan")),
    "endless seconds": _say("seconds", float("inf")),
    "an accuracy above 1": _say("accuracy", 1.5),
    "an accuracy that is no number": _say("accuracy", float("nan")),
    "no change of its variate": _drop("variate"),
    "an array too few in its variate": lambda c: _drop_array(c, "variate"),
    "another shape in its variate": _change(lambda a: a.ravel()[:1], "variate"),
}


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
