import threading

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedge_sim import records
from fedge_sim.client_app import app as client_app
from fedge_sim.data import federated_data
from fedge_sim.errors import RosterError
from fedge_sim.runtime import roster as roster_module
from fedge_sim.runtime.in_process import InProcessGrid
from fedge_sim.runtime.roster import MOST_NAMED, assign, call_roster, survey


def answer(node_config):
    """Return what a node with this configuration says it serves."""
    with InProcessGrid(client_app, 1, node_config=node_config) as grid:
        message = records.instruction(grid.get_node_ids()[0], records.ASK_CLIENTS, ConfigRecord())
        (reply,) = grid.send_and_receive([message])
        return records.config_of(reply)


def test_what_nodes_say():
    simulated = answer({"partition-id": 1, "num-partitions": 2})
    assert simulated == {"serves-any": True, "client-ids": [], "num-nodes": 2}
    assert answer({})["serves-any"]
    assert answer({"partition-id": 4})["client-ids"] == [4]
    assert answer({"client-ids": "0, 3 6"})["client-ids"] == [0, 3, 6]
    assert not answer({"client-ids": "0"})["serves-any"]
    assert not answer({"client-ids": ""})["serves-any"]
    assert answer({"client-ids": 5, "num-partitions": 9})["client-ids"] == [5]


ANY = {"serves-any": True, "client-ids": []}


def test_clients_are_dealt_out_in_turn_whatever_the_order_of_answers():
    assert assign({7: ANY, 3: ANY}, 5) == {0: 3, 1: 7, 2: 3, 3: 7, 4: 3}
    assert assign({3: ANY, 7: ANY}, 5) == assign({7: ANY, 3: ANY}, 5)


def test_more_nodes_than_clients():
    assert assign(dict.fromkeys(range(12), ANY), 2) == {0: 0, 1: 1}


def test_a_named_client_goes_to_its_node():
    named = {"serves-any": False, "client-ids": [1, 2]}
    assert assign({5: ANY, 9: named}, 4) == {0: 5, 1: 9, 2: 9, 3: 5}
    assert assign({9: named}, 4) == {1: 9, 2: 9}


def test_a_million_clients_are_worked_out_when_asked_for():
    named = {"serves-any": False, "client-ids": [1, 999_999, 1_000_000]}
    roster = assign({5: ANY, 7: ANY, 9: named}, 1_000_000)
    assert len(roster) == 1_000_000
    assert [roster[client] for client in (0, 1, 2, 3, 999_998, 999_999)] == [5, 9, 5, 7, 5, 9]
    assert roster.nodes == [5, 7, 9]
    assert 1_000_000 not in roster
    assert -1 not in roster
    assert next(roster.missing, None) is None
    assert next(iter(roster.items())) == (0, 5)
    assert list(assign({9: named}, 3)) == [1]
    assert list(assign({9: named}, 3).missing) == [0, 2]


def test_a_node_that_gets_no_client_is_not_asked():
    named = {"serves-any": False, "client-ids": [1]}
    assert assign({5: ANY, 7: ANY, 9: named}, 3).nodes == [5, 9]  # 7's turn would be client 1
    assert assign({5: ANY, 7: ANY}, 1).nodes == [5]
    assert assign({}, 3).nodes == []


def test_a_long_list_of_clients_that_no_node_serves_is_cut_off():
    with (
        InProcessGrid(client_app, 1, node_config={"client-ids": ""}) as grid,
        pytest.raises(RosterError, match=rf"client 0, 1, .*, {MOST_NAMED - 1} and 80 more: 1 "),
    ):
        call_roster(grid, MOST_NAMED + 80, timeout_s=0.1)


def test_a_client_that_no_node_serves_is_named():
    with (
        InProcessGrid(client_app, 1, node_config={"client-ids": "0 2"}) as grid,
        pytest.raises(RosterError, match=r"no node serves client 1, 3: 1 nodes answered"),
    ):
        call_roster(grid, 4, timeout_s=0.5)


def test_a_node_that_cannot_answer_is_asked_once_and_named(caplog):
    with (
        InProcessGrid(client_app, 1, node_config={"client-ids": "0 x"}) as grid,
        pytest.raises(RosterError, match=r"client 0: 0 nodes answered within 1 s, 1 failed"),
    ):
        call_roster(grid, 1, timeout_s=1)
    warnings = [r for r in caplog.records if "cannot say which clients it serves" in r.message]
    assert len(warnings) == 1
    assert "invalid literal for int() with base 10: 'x'" in warnings[0].message


class Gathering(InProcessGrid):
    """Nodes that appear one after another, as those of a simulation do."""

    def __init__(self):
        super().__init__(self.serve, 1)
        self.calls = 0

    def get_node_ids(self):
        self.calls += 1
        return list(range(10, 10 + min(self.calls, 3)))

    @staticmethod
    def serve(message: Message, context: Context) -> Message:
        node_config = {"partition-id": message.metadata.dst_node_id - 10, "num-partitions": 3}
        return client_app(message, Context(1, 2, node_config, RecordDict(), {}))


def test_the_roster_waits_for_all_nodes_of_a_simulation():
    with Gathering() as grid:
        assert call_roster(grid, 4, timeout_s=10) == {0: 10, 1: 11, 2: 12, 3: 10}


def test_survey_sums_up_what_nodes_hold(small):
    with Gathering() as grid:
        roster = call_roster(grid, 9, timeout_s=10)
        data = survey(grid, roster, small())
    with InProcessGrid(client_app, 1) as grid:
        other = survey(grid, dict.fromkeys(range(9), 2), small())
    held = federated_data(small())
    for summary in (data, other):
        assert summary.example_shape == (6, 40)
        assert summary.content == held.dataset.content
        for client in range(9):
            for split in ("train", "test"):
                np.testing.assert_array_equal(
                    getattr(summary.clients[client], split), getattr(held.clients[client], split)
                )
            np.testing.assert_array_equal(summary.scales[client].mean, held.scales[client].mean)
            np.testing.assert_array_equal(summary.scales[client].std, held.scales[client].std)
    assert len(data.num_train) == len(data.num_test) == 9


class Coming(InProcessGrid):
    """Nodes that come and go: by id, what each serves."""

    def __init__(self, **nodes):
        super().__init__(self.serve, 1)
        self.nodes = {10: {"client-ids": "0 1"}, 11: {"client-ids": "2"}, 12: {}, 13: {}}

    def get_node_ids(self):
        return list(self.nodes)

    def serve(self, message: Message, context: Context) -> Message:
        config = self.nodes[message.metadata.dst_node_id]
        return client_app(message, Context(1, 2, config, RecordDict(), {}))


@pytest.fixture
def looked(monkeypatch):
    """Return a function that looks for new nodes until all have answered."""
    monkeypatch.setattr(roster_module, "LOOK_SECONDS", 0.0)

    def look(roster, grid):
        roster.look_for_new_nodes(grid)
        while roster._asked:
            roster.look_for_new_nodes(grid)

    return look


def test_a_node_that_comes_back_takes_its_clients_over(looked):
    with Coming() as grid:
        roster = call_roster(grid, 6, timeout_s=10)
        assert roster == {0: 10, 1: 10, 2: 11, 3: 13, 4: 12, 5: 13}
        looked(roster, grid)
        assert roster == {0: 10, 1: 10, 2: 11, 3: 13, 4: 12, 5: 13}
        del grid.nodes[11], grid.nodes[13]
        looked(roster, grid)
        assert roster == {0: 10, 1: 10, 2: 11, 3: 13, 4: 12, 5: 13}  # nobody else serves those
        grid.nodes |= {5: {"client-ids": "2"}, 6: {}, 7: {}, 8: {"client-ids": "x"}}
        looked(roster, grid)
        assert roster == {0: 10, 1: 10, 2: 5, 3: 6, 4: 12, 5: 6}
        grid.nodes[14] = {"client-ids": "1 9"}  # while its forerunner is still taken to be alive
        looked(roster, grid)
        assert roster == {0: 10, 1: 14, 2: 5, 3: 6, 4: 12, 5: 6}
        del grid.nodes[12]
        looked(roster, grid)
        assert roster[4] == 7  # which had come before


def test_nobody_waits_for_what_a_new_node_says(monkeypatch):
    monkeypatch.setattr(roster_module, "LOOK_SECONDS", 0.0)
    gate = threading.Event()

    class Slow(Coming):
        def serve(self, message, context):
            if message.metadata.dst_node_id == 20:
                gate.wait(60)
            return super().serve(message, context)

    with Slow() as grid:
        roster = call_roster(grid, 4, timeout_s=10)
        grid.nodes[20] = {"client-ids": "0"}
        roster.look_for_new_nodes(grid)
        roster.look_for_new_nodes(grid)
        assert roster[0] == 10
        gate.set()
        while roster._asked:
            roster.look_for_new_nodes(grid)
        assert roster[0] == 20
