"""Replies of the wrong form: the client is left out by name, and counts as one that failed."""

import re

import pytest

from fedge_sim.device_run import DeviceRun
from fedge_sim.errors import RoundError
from fedge_sim.orchestrator import Orchestrator
from fedge_sim.runtime.in_process import InProcessGrid
from tests import unruly
from tests.conftest import same_models
from tests.test_device_run import DEVICES, REVIVE, Models

# What is wrong with a reply to train, and what the log says of it.
TRAINED = {
    "another shape": r"the array '.*' of 'arrays' in its reply is float32 of shape .*, and was sent",
    "a shape that broadcasts": r"is float32 of shape \(1,\), and was sent as float32 of shape \(",
    "float64": "is float64 of shape .*, and was sent as float32",
    "integers": "is int64 of shape .*, and was sent as float32",
    "text in the place of an array": "is <U1 of shape .*, and was sent as float32",
    "an array too few": "its reply lacks the array '.*' of 'arrays'",
    "an array too many": "its reply has, and was not sent, the array 'more' of 'arrays'",
    "half an array": "the array '.*' of 'arrays' in its reply cannot be read: ",
    "another array than it says": r"is float64 of shape \(3,\), and was sent as float32",
    "no model": "its reply lacks the array '.*' of 'arrays'",
    "no metrics": "its reply has no metrics",
    "text in the place of metrics": "its reply has no metrics",
    "no metric": "'num-examples' in its reply is None, and must be a whole number of at least 1",
    "a list of examples": r"'num-examples' in its reply is \[1, 2\], and must be a whole",
    "negative examples": "'num-examples' in its reply is -3, and must be a whole number",
    "no examples": "'num-examples' in its reply is 0, and must be a whole number of at least 1",
    "fractional examples": "'num-examples' in its reply is 2.5, and must be a whole number",
    "examples that are no number": "'num-examples' in its reply is nan, and must be a whole number",
    "too many examples": r"'num-examples' in its reply is 10000\d*\.\.\.\d*, and must be a whole number",
    "a negative loss": "'loss' in its reply is -1.0, and must be a number that is not negative",
    "a loss that is not finite": "its loss is not finite",
    "endless seconds": "'seconds' in its reply is inf, and must be a number that is not negative",
}
VARIATES = {
    "no change of its variate": "its reply lacks the array '.*' of 'variate'",
    "an array too few in its variate": "its reply lacks the array '.*' of 'variate'",
    "another shape in its variate": r"of 'variate' in its reply is float32 of shape \(1,\)",
}
EVALUATED = {
    "no metrics": "its reply has no metrics",
    "no metric": "'num-examples' in its reply is None, and must be a whole number of at least 0",
    "negative examples": "'num-examples' in its reply is -3",
    "fractional examples": "'num-examples' in its reply is 2.5",
    "a negative loss": "'loss' in its reply is -1.0",
    "an accuracy above 1": "'accuracy' in its reply is 1.5, and must be 0 to 1",
    "an accuracy that is no number": "'accuracy' in its reply is nan, and must be 0 to 1",
}
# One leaf server, whose first client alone behaves.
ONE_LEAF = (
    *("hierarchy.num_servers=1", "hierarchy.clients_per_server=[9]"),
    *("hierarchy.global_rounds=1", "runtime.max_retries=0"),
)


def eights(cases):
    """Return cases in groups of at most eight: the clients 1 to 8."""
    names = list(cases)
    return [names[begin : begin + 8] for begin in range(0, len(names), 8)]


def in_process(settings, cohort_size=1):
    with InProcessGrid(
        unruly.app,
        2,
        settings.runtime,
        together=unruly.answer_together,
        cohort_size=cohort_size,
    ) as grid:
        return Orchestrator(settings, grid).run().last


def check_trained(settings, caplog, names, words, run):
    """Spoil a reply of each client but the first, and compare with the first alone."""
    unruly.rule(settings, **{f"c{n}": (name, 99) for n, name in enumerate(names, start=1)})
    last = run(settings)
    for client, name in enumerate(names, start=1):
        line = rf"client {client} of leaf server 0 left out: .*{words[name]}"
        assert re.search(line, caplog.text), (name, caplog.text)
        assert unruly.tries(settings, client) == 1
    unruly.rule(settings, **{f"c{n}": ("raise", 99) for n in range(1, 1 + len(names))})
    assert same_models(last, run(settings))


@pytest.mark.parametrize("names", eights(TRAINED))
def test_who_replies_in_another_form_is_left_out_of_a_round(small, caplog, names):
    check_trained(small(*ONE_LEAF), caplog, names, TRAINED, in_process)


@pytest.mark.parametrize("names", eights(VARIATES))
def test_scaffolds_variates_are_of_the_form_that_was_sent(small, caplog, names):
    settings = small(*ONE_LEAF, "hierarchy.client_rule=scaffold")
    check_trained(settings, caplog, names, VARIATES, in_process)


def test_pfedmes_shared_model_too(small, caplog):
    settings = small(*ONE_LEAF, "hierarchy.client_rule=pfedme")
    check_trained(settings, caplog, ["float64", "no model"], TRAINED, in_process)


def test_in_a_cohort_it_is_the_only_one_left_out(small, caplog):
    settings = small(*ONE_LEAF, "runtime.training=cohort")
    unruly.rule(settings, c4=("float64", 99))
    last = in_process(settings, cohort_size=3)
    assert any(4 in cohort for cohort in unruly.cohorts(settings))
    assert [c.client for c in last.clients if not c.bytes_up] == [4]
    assert "client 4 of leaf server 0 left out: the array " in caplog.text
    assert "cohort failed" not in caplog.text


def test_it_is_run_again_as_often_as_any_that_fails(small, caplog):
    settings = small(*ONE_LEAF, "runtime.max_retries=2")
    unruly.rule(settings, c4=("float64", 2), c5=("no metrics", 99))
    last = in_process(settings)
    assert [c.client for c in last.clients if not c.bytes_up] == [5]
    assert (unruly.tries(settings, 4), unruly.tries(settings, 5)) == (3, 3)
    assert "client 5 of leaf server 0 (train) failed, try 2 of 3: its reply has no" in caplog.text
    assert "Traceback" not in caplog.text


def check_evaluated(settings, caplog, run):
    unruly.rule(settings, **{f"e{n}": (name, 99) for n, name in enumerate(EVALUATED, start=1)})
    last = run(settings)
    for client, words in enumerate(EVALUATED.values(), start=1):
        assert re.search(rf"client {client} of leaf server 0 left out: {words}", caplog.text)
    assert [c.client for c in last.clients if c.cloud_test.num_examples] == [0, 8]
    assert all(c.bytes_up for c in last.clients)
    assert 0 < last.mean_client_accuracy <= 1


def test_who_evaluates_in_another_form_is_left_out_of_the_evaluation(small, caplog):
    check_evaluated(small(*ONE_LEAF), caplog, in_process)


# ------------------------------------------------------------------ versions

COUNTED = {
    "no class counts": "'class-counts' in its reply is None, and must be 10 whole numbers",
    "a class too few": r"'class-counts' in its reply is \[.*\], and must be 10 whole numbers",
    "examples of no class": r"must be 10 whole numbers that sum up to its 40 examples",
}
VERSIONS = (
    *(*DEVICES, "devices.devices_per_leaf=10", "devices.max_model_version=100"),
    *("hierarchy.server_lr=1.0", "asynchronous.rule=fedasync", "devices.eval_frequency=100"),
    *("devices.num_updates_for_model=1", "runtime.max_retries=0"),
)


def check_versions(settings, caplog, names, words):
    unruly.rule(settings, **{f"c{n}": (name, 99) for n, name in enumerate(names)})
    told = Models()
    with InProcessGrid(unruly.app, 2, settings.runtime) as grid:
        DeviceRun(settings, grid, [told]).run()
    came = {job.client for v in told.versions for job in v.event.jobs}
    assert came >= {*range(len(names))}
    for client, name in enumerate(names):
        line = rf"device {client} of leaf server 0 left out: .*{words[name]}"
        assert re.search(line, caplog.text), name
    left_out = [v for v in told.versions if not v.num_updates]
    assert {job.client for v in left_out for job in v.event.jobs} == {*range(len(names))}


@pytest.mark.parametrize("names", eights(TRAINED))
def test_who_replies_in_another_form_is_left_out_of_a_version(small, caplog, names):
    check_versions(small(*VERSIONS), caplog, names, TRAINED)


def test_fedrevives_class_counts_are_those_of_the_examples(small, caplog):
    settings = small(*VERSIONS, "asynchronous.rule=fedrevive", *REVIVE)
    check_versions(settings, caplog, list(COUNTED), COUNTED)


def test_an_evaluation_of_held_out_examples_in_another_form(small, caplog):
    settings = small(*VERSIONS, "devices.max_model_version=2")
    told = Models()
    unruly.rule(settings, e0=("negative examples held out", 99))
    with (
        InProcessGrid(unruly.app, 2, settings.runtime) as grid,
        pytest.raises(RoundError, match="no part of the held-out examples could be evaluated"),
    ):
        DeviceRun(settings, grid, [told]).run()
    assert "shard 0 left out of an evaluation: 'held-out-num-examples' in its reply" in caplog.text
