"""A ClientApp that counts in its clients' state how often each was trained; Ray's actors import it.

The config of a message may say what a client does wrong when it trains, and how often.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Context, Message, MetricRecord

from fedge_sim import records
from tests.unruly import misbehave

NODE = 2


def question(kind: str, client: int, flat_round: int = 1, **more: str | int) -> Message:
    """Return a message to a client: train or evaluate."""
    told = {records.SETTINGS: "{}", records.CLIENT_ID: client, records.ROUND: flat_round, **more}
    told |= {records.PURPOSE: records.LEAF, records.SPLITS: ["test"]}
    address = records.Address(kind, 0, client)
    return records.instruction(NODE, kind, ConfigRecord(told), None, address)


def app(message: Message, context: Context) -> Message:
    """Answer what the state was, and how many states were there; then count on."""
    return answer_together([message], context)[0]


def answer_together(messages: Sequence[Message], context: Context) -> list[Message]:
    """Answer messages of several clients."""
    there = len(context.state)
    replies = []
    for message in messages:
        config = records.config_of(message)
        key = records.state_key(config[records.CLIENT_ID])
        seen = 0
        if state := context.state.array_records.get(key):
            seen = int(records.to_arrays(state)["count"])
        context.state[key] = records.to_record({"count": np.array(seen + 1)})
        go_wrong(config)
        told = {"seen": seen, "there": there, "pid": os.getpid(), "cohort": len(messages)}
        replies.append(replied(message, **told))
    return replies


def replied(message: Message, **told: int) -> Message:
    """Return a reply of the right form, with what else is told."""
    right = {
        records.NUM_EXAMPLES: 1,
        records.LOSS: 0.5,
        records.ACCURACY: 0.5,
        records.SECONDS: 0.1,
    }
    return records.reply(message, metrics=MetricRecord({**right, **told}))


def go_wrong(config: dict) -> None:
    """Do what the message says, so many times."""
    if what := config.get("what"):
        folder = Path(config["folder"])
        (folder / f"try-{config[records.CLIENT_ID]}-{time.time_ns()}").touch()
        if len(list(folder.glob(f"try-{config[records.CLIENT_ID]}-*"))) <= config["times"]:
            misbehave(what, config[records.CLIENT_ID])
