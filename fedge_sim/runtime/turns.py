"""One message at a time for each node, where nodes keep what their clients remember.

Flower's simulation gives every message of a node the node's context as it was when the message
was taken up, and keeps the one that comes back last: of two clients that train on a node side by
side, one would lose its state.
"""

import time
from collections import deque
from collections.abc import Iterable

from flwr.app import Message
from flwr.serverapp import Grid

POLL_SECONDS = 0.05


def send_in_turn(grid: Grid, messages: Iterable[Message]) -> list[Message]:
    """Send messages and return the replies; a node gets its next one when it has replied."""
    waiting: dict[int, deque[Message]] = {}
    for message in messages:
        waiting.setdefault(message.metadata.dst_node_id, deque()).append(message)
    replies: list[Message] = []
    under_way: dict[str, int] = {}  # message id -> node
    free = list(waiting)
    while free or under_way:
        for node in free:
            if waiting[node]:
                [message_id] = grid.push_messages([waiting[node].popleft()])
                under_way[message_id] = node
        if not under_way:
            break
        new = list(grid.pull_messages(list(under_way)))
        free = [under_way.pop(reply.metadata.reply_to_message_id) for reply in new]
        replies += new
        if not new:
            time.sleep(POLL_SECONDS)
    return replies
