"""The node: which messages are answered together, and what becomes of a cohort that fails."""

import itertools

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, MetricRecord
from hypothesis import given
from hypothesis import strategies as st

from fedge_sim import records
from fedge_sim.runtime.in_process import InProcessGrid
from fedge_sim.runtime.node import EVALUATED_TOGETHER, Failure, Node, cohorts, give_id

MODELS = [records.to_record({"w": np.full(2, value, np.float32)}) for value in (1, 2)]
EQUAL = records.to_record({"w": np.full(2, 1, np.float32)})  # to the first, and not the same


@pytest.fixture(scope="module", autouse=True)
def _run():
    with InProcessGrid(None, 1):  # messages need the identity that a grid gives
        yield


def message(
    kind, client=0, work=1, settings="s", model=MODELS[0], purpose="leaf", splits=("test",)
):
    told = {records.SETTINGS: settings, records.CLIENT_ID: client, records.WORK: work}
    if kind == "evaluate":
        told |= {records.PURPOSE: purpose, records.SPLITS: list(splits)}
    address = records.Address(purpose, 0, client)
    return records.instruction(2, kind, ConfigRecord(told), model, address)


def common(message):
    """What the messages of a cohort must have in common."""
    config = records.config_of(message)
    settings = config[records.SETTINGS]
    if message.metadata.message_type == "train":
        return settings
    model = id(records.arrays_of(message))
    return settings, config[records.PURPOSE], tuple(config[records.SPLITS]), model


drawn = st.builds(
    message,
    kind=st.sampled_from(["train", "evaluate", "query"]),
    work=st.integers(0, 50),
    settings=st.sampled_from(["s", "t"]),
    model=st.sampled_from([*MODELS, EQUAL]),
    purpose=st.sampled_from(["leaf", "cloud"]),
    splits=st.sampled_from([("test",), ("test", "train")]),
)


@given(st.lists(drawn, max_size=40), st.integers(1, 20), st.integers(1, 4))
def test_every_message_is_in_one_cohort_with_its_like(messages, size, workers):
    place = {id(message): number for number, message in enumerate(messages)}
    found = cohorts(messages, size, workers)
    order = [[place[id(message)] for message in cohort] for cohort in found]
    assert sorted(itertools.chain(*order)) == list(range(len(messages)))
    assert all(cohort == sorted(cohort) for cohort in order)
    assert order == sorted(order)
    evaluated = [m for m in messages if m.metadata.message_type == "evaluate"]
    share = sum(map(records.work_of, evaluated)) / workers
    for cohort in found:
        (kind,) = {message.metadata.message_type for message in cohort}
        if kind == "train":
            alike = [m for m in messages if m.metadata.message_type == kind]
            alike = [m for m in alike if common(m) == common(cohort[0])]
            assert len(cohort) <= min(size, -(-len(alike) // workers))
        if len(cohort) > 1:
            assert kind in ("train", "evaluate")
            assert len({common(message) for message in cohort}) == 1
        if len(cohort) > 1 and kind == "evaluate":
            assert len(cohort) <= (size if size > 1 else EVALUATED_TOGETHER)
            assert workers == 1 or sum(map(records.work_of, cohort)) <= share / 4


CUT = [
    # the work of each, size, workers; the sizes of cohorts
    ([1] * 9, 5, 2, [4, 5]),
    ([1] * 9, 16, 2, [4, 5]),
    ([1] * 9, 1, 2, [1] * 9),
    ([1] * 9, 9, 1, [9]),
    ([1] * 10, 4, 2, [2, 3, 2, 3]),  # not 4, 4 and 2: the last would wait for one worker
    ([5, 5, 5, 1, 1, 1, 1, 1, 1], 16, 2, [2, 5, 2]),  # of about equal work
    ([0, 0, 0], 16, 1, [3]),
]


@pytest.mark.parametrize(("work", "size", "workers", "sizes"), CUT)
def test_training_is_cut_into_parts_of_equal_work(work, size, workers, sizes):
    messages = [message("train", client, amount) for client, amount in enumerate(work)]
    assert [len(cohort) for cohort in cohorts(messages, size, workers)] == sizes


def test_clients_are_evaluated_together_where_they_train_alone():
    messages = [message("evaluate", client) for client in range(40)]
    assert [len(cohort) for cohort in cohorts(messages, 1)] == [16, 16, 8]
    assert [len(cohort) for cohort in cohorts(messages, 1, 2)] == [5] * 8  # a quarter of 20
    assert [len(cohort) for cohort in cohorts(messages, 4)] == [4] * 10


def test_without_a_function_that_answers_them_there_are_no_cohorts():
    node = Node(reply, 1)
    messages = [message("evaluate", client) for client in range(3)]
    assert node.cohorts(messages, 3) == [[m] for m in messages]
    assert len(node.answer_all(messages)) == 3


def reply(message, context):
    metrics = {records.NUM_EXAMPLES: 1, records.LOSS: 0.5, records.SECONDS: 0.1}
    metrics |= {records.ACCURACY: 0.5}
    return records.reply(message, arrays=records.arrays_of(message), metrics=MetricRecord(metrics))


def reply_together(messages, context):
    return [reply(message, context) for message in messages]


amounts = st.lists(st.integers(0, 100), min_size=2, max_size=20)


@given(amounts)
def test_the_time_of_a_cohort_is_divided_by_work(work):
    messages = [message("train", client, amount) for client, amount in enumerate(work)]
    answers = Node(reply, 1, together=reply_together).answer_all(messages)
    for before, after in itertools.pairwise(answers):
        assert before.started <= before.ended == after.started
    span = answers[-1].ended - answers[0].started
    for amount, answer in zip(work, answers, strict=True):
        share = span * amount / max(1, sum(work))
        if sum(work):
            assert answer.ended - answer.started == pytest.approx(share, abs=1e-6)
    assert [a.result.metadata.reply_to_message_id for a in answers] == [
        m.metadata.message_id for m in messages
    ]
    assert len({answer.result.metadata.message_id for answer in answers}) == len(work)


def test_a_cohort_without_memory_fails_as_a_whole():
    def hungry(messages, context):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def never(message, context):
        raise AssertionError

    answers = Node(never, 1, together=hungry).answer_all([message("train", c) for c in range(3)])
    assert [answer.result.out_of_memory for answer in answers] == [True] * 3


@pytest.mark.parametrize("together", [lambda m, c: 1 / 0, lambda m, c: [reply(m[0], c)]])
def test_after_another_failure_each_is_answered_alone(together, caplog):
    def app(message, context):
        if records.config_of(message)[records.CLIENT_ID] == 1:
            raise RuntimeError("the battery is empty")
        return reply(message, context)

    messages = [message("train", client) for client in range(3)]
    answers = Node(app, 1, together=together).answer_all(messages)
    assert [isinstance(answer.result, Failure) for answer in answers] == [False, True, False]
    (warning,) = caplog.messages
    assert warning.startswith("cohort failed, each is run alone: ")
    assert "client 1 of leaf server 0" in warning


@pytest.mark.parametrize(
    "error", [SystemExit(0), SystemExit("bye"), KeyboardInterrupt(), GeneratorExit(), MemoryError()]
)
def test_whatever_a_client_raises_is_its_own_failure(error, caplog):
    def app(message, context):
        if records.config_of(message)[records.CLIENT_ID] == 1:
            raise error
        return reply(message, context)

    def together(messages, context):
        return [app(message, context) for message in messages]

    messages = [message("train", client) for client in range(3)]
    answers = [Node(app, 1).answer(message) for message in messages]
    assert [isinstance(answer.result, Failure) for answer in answers] == [False, True, False]
    assert answers[1].result.reason == f"{type(error).__name__}: {error}"
    assert answers[1].result.out_of_memory == isinstance(error, MemoryError)
    if not isinstance(error, MemoryError):
        answers = Node(app, 1, together=together).answer_all(messages)
        assert [isinstance(answer.result, Failure) for answer in answers] == [False, True, False]


def to_another(message, context):
    return reply(messages_of(5)[0], context)


def messages_of(client):
    return [message("train", client)]


def an_error(message, context):
    return Message(Error(1, "the battery is empty"), reply_to=message)


@pytest.mark.parametrize(
    ("app", "reason"),
    [
        (lambda m, c: None, "its reply is a NoneType, not a Message"),
        (lambda m, c: m, "its reply is not to the message that it was sent"),
        (to_another, "its reply is not to the message that it was sent"),
        (an_error, "the battery is empty"),
        (
            lambda m, c: records.reply(m),
            "its reply has no metrics (a MetricRecord named 'metrics')",
        ),
    ],
)
def test_what_is_no_reply_is_a_failure(app, reason):
    (asked,) = messages_of(1)
    give_id(asked)
    answer = Node(app, 1).answer(asked)
    assert answer.result == Failure(reason)
