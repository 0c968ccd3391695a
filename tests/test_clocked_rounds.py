"""Rounds of all clients on the virtual clock: how long they last, and who is lost."""

import csv
import io
import logging
import re

import numpy as np
import pytest
from rich.console import Console

from fedge_sim import client_app, records
from fedge_sim.errors import ConfigError
from fedge_sim.methods import METHODS
from fedge_sim.orchestrator import Orchestrator
from fedge_sim.reporting.progress import ConsoleReporter
from fedge_sim.runtime.in_process import InProcessGrid
from fedge_sim.training.local import Reference
from tests.conftest import Keep, run, same_models

CLOCK = [
    "devices.enable=true",
    'devices.device_speed={distribution="constant", mean=2.0}',
    'devices.communication_delay={distribution="constant", mean=0.5}',
]


def rounds(settings, app=client_app.app):
    keep = Keep()
    with InProcessGrid(app, 2, settings.runtime) as grid:
        Orchestrator(settings, grid, [keep]).run()
    return keep.records


def test_a_round_lasts_as_long_as_its_slowest_client(small):
    told = rounds(
        small(*CLOCK, "hierarchy.global_rounds=2", "hierarchy.server_rounds_per_global=2")
    )
    assert [r.simulated_seconds for r in told] == [5.0, 10.0]  # two server rounds of 2.5
    assert {c.simulated_seconds for r in told for c in r.clients} == {5.0}
    assert {c.fate for r in told for c in r.clients} == {"update"}


def test_bytes_take_time_on_both_links(small):
    size = rounds(small("hierarchy.global_rounds=1"))[0].clients[0].bytes_down
    links = [
        f"devices.client_leaf_bandwidth={{down={size / 4.0}, up={size / 8.0}}}",
        f"devices.leaf_cloud_bandwidth={{down={size / 16.0}, up={size / 32.0}}}",
    ]
    [told] = rounds(small(*CLOCK, *links, "hierarchy.global_rounds=1"))
    assert told.simulated_seconds == pytest.approx(2.5 + 4 + 8 + 16 + 32)


def test_a_job_takes_so_long_a_step(small):
    per_step = [*CLOCK, 'devices.device_speed_per="step"', "devices.local_iters=3"]
    [told] = rounds(small(*per_step, "hierarchy.global_rounds=1"))
    assert told.simulated_seconds == 2.0 * 3 + 0.5
    by_epochs = [*CLOCK, 'devices.device_speed_per="step"', "hierarchy.local_epochs=2"]
    [told] = rounds(small(*by_epochs, "hierarchy.global_rounds=1"))
    most = max(client.num_train for client in told.clients)
    assert told.simulated_seconds == pytest.approx(2.0 * 2 * -(-most // 32) + 0.5)


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("hierarchy.client_rule=pfedme", "hierarchy.pfedme_steps=3"),
        ("hierarchy.client_rule=pfedme", "hierarchy.local_steps=4"),
        ("hierarchy.batch_size=8", "hierarchy.accumulation=2"),
    ],
)
def test_a_job_takes_the_steps_that_training_does(small, monkeypatch, more):
    """A client with 33 examples and batches of 32 does one step an epoch, not two."""
    taken, train = [], Reference.train

    def spy(self, clients):
        updates = train(self, clients)
        taken.extend(update.steps for update in updates)
        return updates

    monkeypatch.setattr(Reference, "train", spy)
    settings = small(
        *(*CLOCK, 'devices.device_speed_per="step"', "hierarchy.global_rounds=1"),
        *("app.config.synthetic-windows-per-client=41", "hierarchy.local_epochs=5", *more),
    )
    [told] = rounds(settings)
    assert {client.num_train for client in told.clients} == {33}
    assert told.simulated_seconds == 2.0 * max(taken) + 0.5
    if not more:
        assert set(taken) == {5}


def test_variates_take_time_between_clients_and_leaf_servers_alone(small):
    one_round = "hierarchy.global_rounds=1"
    model = rounds(small(one_round))[0].clients[0].bytes_down
    scaffold = (one_round, "hierarchy.client_rule=scaffold")
    both = rounds(small(*scaffold))[0].clients[0].bytes_down
    assert both > 1.5 * model
    links = (
        f"devices.client_leaf_bandwidth={{down={both / 4.0}, up={both / 8.0}}}",
        f"devices.leaf_cloud_bandwidth={{down={model / 16.0}, up={model / 32.0}}}",
    )
    [told] = rounds(small(*CLOCK, *links, *scaffold))
    assert told.simulated_seconds == pytest.approx(2.5 + 4 + 8 + 16 + 32)


def test_bytes_are_those_that_were_sent(small):
    """Who drops out was sent the model; who was offline was not."""
    size = rounds(small("hierarchy.global_rounds=1"))[0].clients[0].bytes_down
    losses = ("devices.dropout=0.3", "devices.availability={online=0.5, session=50.0}")
    told = rounds(
        small(*CLOCK, *losses, "devices.job_timeout=9.0", "hierarchy.global_rounds=6"),
    )
    of_fate: dict[str, set[tuple[int, int]]] = {}
    for client in (c for record in told for c in record.clients):
        begun = client.simulated_seconds > 0  # in one round at least, of those that are held
        if client.lost + (client.fate == "update") == 1:
            assert client.bytes_down == begun * size
        came = client.fate == "update"
        assert client.bytes_up == came * size
        of_fate.setdefault(client.fate, set()).add((client.bytes_down, begun))
    assert (size, True) in of_fate["dropped out"]
    assert (0, False) in of_fate["went offline"]


def test_the_clock_changes_nothing_but_the_time(small):
    plain = run(small("hierarchy.global_rounds=2"), []).last
    for scale in (1.0, 10.0, 1e7):  # years, were any of it waited for
        speed = f'{{distribution="exponential", mean=[{scale}, {3 * scale}]}}'
        on_clock = run(
            small(
                *(*CLOCK, "hierarchy.global_rounds=2", f"devices.device_speed={speed}"),
                f'devices.communication_delay={{distribution="constant", mean={0.1 * scale}}}',
                *("devices.job_timeout=0.0", "devices.update_timeout=0.0"),
            ),
            [],
        ).last
        assert same_models(plain, on_clock)
        if scale == 1.0:
            once = on_clock.simulated_seconds
        assert on_clock.simulated_seconds == pytest.approx(scale * once)
    assert np.isnan(plain.simulated_seconds)


def test_stragglers_are_dropped_and_counted_and_cost_no_real_work(small):
    trained = []

    def app(message, context):
        if message.metadata.message_type == "train":
            config = records.config_of(message)
            trained.append((config[records.ROUND], config[records.CLIENT_ID]))
        return client_app.app(message, context)

    settings = small(
        *(*CLOCK, "hierarchy.global_rounds=4", "devices.job_timeout=3.0"),
        'devices.device_speed={distribution="exponential", mean=2.0}',
    )
    told = rounds(settings, app)
    lost = {(r.global_round, c.client) for r in told for c in r.clients if c.lost}
    late = {c.fate for r in told for c in r.clients if c.lost}
    everyone = {(r.global_round, c.client) for r in told for c in r.clients}
    assert late == {"timed out"}
    assert set(trained) == everyone - lost
    times = np.diff([0.0, *(r.simulated_seconds for r in told)])
    assert all(times <= 3.0)
    assert any(times == 3.0)


def test_over_selection_keeps_those_that_come_first(small):
    chosen = [*CLOCK, "hierarchy.participation=0.34", "devices.over_selection=2.0"]
    random = 'devices.device_speed={distribution="exponential", mean=2.0}'
    told = rounds(small(*chosen, random, "hierarchy.global_rounds=3"))
    for record in told:
        for leaf in record.leaves:
            fates = sorted(c.fate for c in leaf.clients)
            assert fates == ["too late", "too late", "update"]
    with pytest.raises(ConfigError, match="over_selection"):
        small(*CLOCK, "devices.over_selection=0.5")


def test_nobody_waits_for_leaf_servers_that_are_not_drawn(small):
    alone = [*METHODS["cfl"].assignments((3, 3, 3)), "hierarchy.participation=0.5"]
    random = 'devices.device_speed={distribution="exponential", mean=2.0}'
    told = rounds(small(*CLOCK, random, *alone, "hierarchy.global_rounds=3"))
    times = np.diff([0.0, *(r.simulated_seconds for r in told)])
    for record, seconds in zip(told, times, strict=True):
        waited = [c.simulated_seconds for c in record.clients if c.fate]
        assert len(waited) == 5
        assert seconds == pytest.approx(max(waited))
        assert all(c.simulated_seconds == c.bytes_up == 0 for c in record.clients if not c.fate)


def test_simulated_seconds_stand_beside_every_round(small, tmp_path):
    settings = small(*CLOCK, "hierarchy.global_rounds=2")
    folder = run(settings).folder
    tables = sorted((folder / "metrics" / f"seed_{settings.seed}").glob("*.csv"))
    assert len(tables) == 6
    for table in tables:
        with table.open(newline="") as file:
            found = {(row["round"], row["simulated_seconds"]) for row in csv.DictReader(file)}
        assert found == {("1", "2.5"), ("2", "5.0")}


def test_the_console_says_the_simulated_time_and_who_was_lost(small, caplog):
    late = ["devices.job_timeout=3.0", "hierarchy.global_rounds=2"]
    speed = 'devices.device_speed={distribution="exponential", mean=2.0}'
    shown = io.StringIO()
    with caplog.at_level(logging.INFO):
        run(small(*CLOCK, *late, speed), [ConsoleReporter(Console(file=shown, width=120))])
    assert re.search(r"round 2/2 .* s  simulated \d\.\d s, \d timed out", caplog.text)
    assert re.search(r"s a round  simulated \d\.\d s, \d timed out", shown.getvalue())
