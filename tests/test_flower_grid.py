"""What the run sees of Flower's grid: every message has a reply of the right form, or an error."""

import time

import pytest
from flwr.app import ConfigRecord, Error, Message, MetricRecord
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode

from fedge_sim import records
from fedge_sim.config import load_settings
from fedge_sim.errors import StalledError
from fedge_sim.records import Address
from fedge_sim.runtime.flower_grid import REFUSED, FlowerGrid
from fedge_sim.runtime.in_process import InProcessGrid
from fedge_sim.runtime.node import client_of
from fedge_sim.runtime.turns import send_in_turn


def runtime(*assignments):
    return load_settings(assignments=[f"runtime.{a}" for a in assignments]).runtime


class Flowers(InProcessGrid):
    """A grid that refuses, forgets and errs as those of Flower do; its clients are named for it."""

    def __init__(self, limit=100):
        super().__init__(self.serve, 2)
        self.limit, self.silent, self.pushed = limit, set(), []

    @staticmethod
    def serve(message, context):
        metrics = {records.NUM_EXAMPLES: 1, records.LOSS: 0.5, records.ACCURACY: 0.5}
        return records.reply(message, metrics=MetricRecord(metrics))

    def push_messages(self, messages):
        messages = list(messages)
        self.pushed.append(len(messages))
        if len(messages) > self.limit:
            return []
        taken = [m for m in messages if client_of(m) != 99]
        super().push_messages(taken)
        self.silent |= {m.metadata.message_id for m in taken if client_of(m) in (7, None)}
        return [m.metadata.message_id if m in taken else None for m in messages]

    def pull_messages(self, message_ids):
        assert all(message_ids)
        assert not self._forgotten & {*message_ids}, "Flower errs if it is asked again"
        replies = super().pull_messages(i for i in message_ids if i not in self.silent)
        self._forgotten |= {reply.metadata.reply_to_message_id for reply in replies}
        return [self._without_address(reply) for reply in replies]

    _forgotten = frozenset()

    @staticmethod
    def _without_address(reply):
        if client_of(reply) == 5:  # as the SuperLink has it where a message is gone
            answer = Message(Error(ErrorCode.MESSAGE_UNAVAILABLE, "gone"), reply_to=reply)
            answer.metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
            answer.metadata.__dict__["_group_id"] = ""
            answer.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
            return answer
        if client_of(reply) == 6:
            del reply.content.metric_records["metrics"]["loss"]
        return reply


def evaluations(*clients):
    config = ConfigRecord({records.SPLITS: ["test"], records.SETTINGS: "{}"})
    return [
        records.instruction(2, "evaluate", config, None, Address("leaf", 0, c)) for c in clients
    ]


def by_client(replies):
    return {
        Address.of(r).client: r.error.reason.splitlines()[0] if r.has_error() else ""
        for r in replies
    }


def test_each_message_has_a_reply_or_an_error_with_its_address():
    with Flowers() as flowers:
        replies = FlowerGrid(flowers, runtime()).send_and_receive(evaluations(0, 5, 6, 99, 1))
    assert by_client(replies) == {
        **{0: "", 1: "", 5: "gone", 99: REFUSED},
        6: "'loss' in its reply is None, and must be a number that is not negative",
    }
    assert {reply.metadata.src_node_id for reply in replies} == {2}


def test_what_is_too_large_together_is_sent_one_by_one():
    with Flowers(limit=1) as flowers:
        grid = FlowerGrid(flowers, runtime())
        assert by_client(grid.send_and_receive(evaluations(0, 1, 99))) == {
            0: "",
            1: "",
            99: REFUSED,
        }
        assert flowers.pushed == [3, 1, 1, 1]
    with Flowers(limit=0) as flowers:
        grid = FlowerGrid(flowers, runtime())
        assert set(by_client(grid.send_and_receive(evaluations(0, 1))).values()) == {REFUSED}


def test_a_client_that_does_not_reply_is_left_out_after_its_time():
    with Flowers() as flowers:
        grid = FlowerGrid(flowers, runtime("client_timeout_s=0.5"))
        started = time.monotonic()
        replies = by_client(grid.send_and_receive(evaluations(0, 7, 1)))
        assert time.monotonic() - started > 0.5
        assert replies == {0: "", 1: "", 7: "no reply within 0.5 s (client_timeout_s)"}
        ids = grid.push_messages(evaluations(7, 2))
        found = []
        while len(found) < 2:
            found += grid.pull_messages(ids)
            time.sleep(0.01)
        assert by_client(found) == {2: "", 7: "no reply within 0.5 s (client_timeout_s)"}
        assert grid.pull_messages(ids) == []
        in_turn = by_client(send_in_turn(grid, evaluations(7, 99, 3)))
        assert in_turn == {3: "", 7: "no reply within 0.5 s (client_timeout_s)", 99: REFUSED}


def test_only_clients_have_a_time_and_no_reply_at_all_ends_the_run():
    question = records.instruction(2, "query", ConfigRecord(), None, None)
    with Flowers() as flowers:
        grid = FlowerGrid(flowers, runtime("client_timeout_s=0.1", "progress_timeout_s=0.6"))
        started = time.monotonic()
        with pytest.raises(StalledError, match=r"no client got done for 0.6 s .*, 1 wait"):
            grid.send_and_receive([question])
        assert time.monotonic() - started > 0.6


def test_after_a_timeout_the_replies_that_are_there():
    with Flowers() as flowers:
        grid = FlowerGrid(flowers, runtime())
        assert by_client(grid.send_and_receive(evaluations(7, 1), timeout=0.5)) == {1: ""}
        assert not grid._open
