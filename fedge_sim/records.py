"""The one place where arrays become Flower records, and messages find their addressees."""

import io
import math
import reprlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common.constant import SType
from numpy.typing import NDArray

from fedge_sim.algorithms import Arrays
from fedge_sim.config import Settings
from fedge_sim.data.base import ClientData, DataSummary, Standardisation
from fedge_sim.training.local import Evaluation

# Purposes of messages: train; evaluate a leaf's model before the cloud step, the model that the
# cloud hands back to the leaf, the average of all leaves, the client's own.
TRAIN, LEAF, CLOUD, GLOBAL, PERSONAL = "train", "leaf", "cloud", "global", "personal"
# Of a device's job; it takes the place of the round in the name of the job's random stream.
JOB = "job"
# Number of shards that the held-out examples are cut into; a message's client is its shard.
HELD_OUT, SHARDS = "held-out", "shards"
CLASS_COUNTS = "class-counts"  # of a client's training examples, which FedRevive asks for
# Names of the records in a message: SCAFFOLD's variate, or its change, goes beside the model.
ARRAYS, CONFIG, METRICS, VARIATE = "arrays", "config", "metrics", "variate"
# Keys of its config and metrics.
SETTINGS, CLIENT_ID, ROUND, LR, PROX_MU = "settings", "client-id", "round", "lr", "prox-mu"
PURPOSE, SPLITS, WORK = "purpose", "splits", "work"
NUM_EXAMPLES, LOSS, ACCURACY = "num-examples", "loss", "accuracy"
SECONDS = "seconds"
PATH = "path"  # by which way a client was trained
_PREFIX = {
    "test": "",
    "train": "train-",
    HELD_OUT: "held-out-",
}  # of an evaluation's metrics, by split
_ROW = np.dtype("<i8")  # of row numbers on the wire
_MOST = 2**53  # of a whole number in a reply: up to there a float has all of them
# The questions of the roster, and what a node answers.
ASK_CLIENTS, ASK_DATA = MessageType.QUERY, f"{MessageType.QUERY}.data"
ASK_TRAINING = f"{MessageType.QUERY}.training"
CLIENT_IDS, NUM_NODES, SERVES_ANY, ERROR = "client-ids", "num-nodes", "serves-any", "error"


class Address(NamedTuple):
    """What a message is for and whom; it travels as the message's group id.

    Replies carry the group id of the message that they answer, error replies too.
    """

    purpose: str
    leaf: int
    client: int

    def __str__(self) -> str:
        return f"{self.purpose}/{self.leaf}/{self.client}"

    @classmethod
    def of(cls, message: Message) -> "Address | None":
        """Read the address of a message; None if it has none (some errors of Flower's)."""
        parts = message.metadata.group_id.split("/")
        return cls(parts[0], int(parts[1]), int(parts[2])) if len(parts) == 3 else None


def state_key(client: int) -> str:
    """Return the key of a client's own ArrayRecord in ``Context.state``."""
    return f"client-{client}"


def to_record(arrays: Arrays) -> ArrayRecord:
    """Return a model's arrays as a record, names and order kept."""
    record = ArrayRecord()
    for name, array in arrays.items():
        record[name] = _to_flower(np.asarray(array))
    return record


def to_arrays(record: ArrayRecord) -> dict[str, NDArray[Any]]:
    """Return the arrays of a record, names and order kept; they are read-only views of it."""
    return {name: _from_flower(array) for name, array in record.items()}


# An Array holds the bytes of an .npy file. Flower writes and reads each as a file, at 50 us an
# array, most of it for the header; a model has few different ones.


def _to_flower(array: NDArray[Any]) -> Array:
    data = _npy_header(array.dtype, array.shape) + array.tobytes()
    return Array(str(array.dtype), tuple(array.shape), SType.NUMPY, data)


def _from_flower(array: Array) -> NDArray[Any]:
    dtype = np.dtype(array.dtype)
    header = _npy_header(dtype, tuple(array.shape))
    if not array.data.startswith(header):  # written by another, in another order of the axes
        return array.numpy()
    return np.frombuffer(array.data, dtype, offset=len(header)).reshape(array.shape)


@lru_cache(maxsize=4096)
def _npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    form = np.lib.format
    description = {"descr": form.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    form.write_array_header_1_0(file, description)
    return file.getvalue()


def instruction(
    node: int,
    message_type: str,
    config: ConfigRecord,
    arrays: ArrayRecord | None = None,
    address: Address | None = None,
    variate: ArrayRecord | None = None,
) -> Message:
    """Return a message to a node."""
    content = RecordDict({CONFIG: config})
    if arrays is not None:
        content[ARRAYS] = arrays
    if variate is not None:
        content[VARIATE] = variate
    return Message(content, node, message_type, group_id=str(address or ""))


def config_of(message: Message) -> dict[str, Any]:
    """Return the config of a message; keys and types are those listed above."""
    return dict(message.content.config_records[CONFIG])


def work_of(message: Message) -> float:
    """Return how much work a message is, in examples to go through; 1 if it does not say."""
    config = message.content.config_records.get(CONFIG)
    return float(config.get(WORK, 1)) if config is not None else 1.0  # type: ignore[arg-type]


def path_of(message: Message) -> str | None:
    """Return by which way a client was trained; None if the reply does not say."""
    config = message.content.config_records.get(CONFIG)
    path = config.get(PATH) if config is not None else None
    return None if path is None else str(path)


def metrics_of(message: Message) -> dict[str, Any]:
    """Return the metrics of a message."""
    return dict(message.content.metric_records[METRICS])


def arrays_of(message: Message) -> ArrayRecord:
    """Return the model of a message."""
    return message.content.array_records[ARRAYS]


def variate_of(message: Message) -> ArrayRecord | None:
    """Return SCAFFOLD's variate in a message, or its change in a reply, if there is one."""
    return message.content.array_records.get(VARIATE)


def train_config(settings: Settings, lr: float, prox_mu: float) -> ConfigRecord:
    """Return what all clients are told for a round of training."""
    return ConfigRecord({SETTINGS: settings.to_json(), LR: lr, PROX_MU: prox_mu})


def evaluate_config(settings: Settings, purpose: str, splits: Sequence[str]) -> ConfigRecord:
    """Return what all clients are told for the evaluation of one model."""
    return ConfigRecord({SETTINGS: settings.to_json(), PURPOSE: purpose, SPLITS: list(splits)})


def describe(data: DataSummary) -> ConfigRecord:
    """Return what a node says of its clients' data; :func:`description` reads it back.

    Of devices that draw their examples it is only the form.
    """
    parts = [part for c in data.clients for part in (c.train, c.test, c.left_out)]
    return ConfigRecord(
        {
            "sizes": [len(part) for part in parts],  # training, test, left out, of each client
            "rows": b"".join(part.astype(_ROW).tobytes() for part in parts),
            "example-shape": list(data.example_shape),
            "classes": list(data.classes),
            "mean": [float(value) for scale in data.scales for value in scale.mean],
            "std": [float(value) for scale in data.scales for value in scale.std],
            "content": data.content,
            "groups": list(data.groups),
            "held-out": data.num_held_out,
            "sides-given": data.sides_given,
        }
    )


def description(config: Mapping[str, Any]) -> DataSummary:
    """Return what a node said of its clients' data."""
    rows = np.frombuffer(config["rows"], _ROW).astype(np.int64)
    sizes = config["sizes"]
    parts = np.split(rows, np.cumsum(sizes)[:-1]) if sizes else []
    channels = config["example-shape"][0]
    scales = (np.asarray(config[key], np.float32).reshape(-1, channels) for key in ("mean", "std"))
    return DataSummary(
        clients=tuple(map(ClientData, parts[::3], parts[1::3], parts[2::3])),
        example_shape=tuple(config["example-shape"]),
        classes=tuple(config["classes"]),
        scales=tuple(map(Standardisation, *scales)),
        content=config["content"],
        groups=tuple(config["groups"]),
        num_held_out=config["held-out"],
        sides_given=config["sides-given"],
    )


def reply(
    message: Message,
    *,
    arrays: ArrayRecord | None = None,
    metrics: MetricRecord | None = None,
    config: ConfigRecord | None = None,
    variate: ArrayRecord | None = None,
) -> Message:
    """Return the reply to a message, with the records that it carries."""
    named = {ARRAYS: arrays, METRICS: metrics, CONFIG: config, VARIATE: variate}
    content = RecordDict({name: record for name, record in named.items() if record is not None})
    return Message(content, reply_to=message)


def put_evaluation(metrics: MetricRecord, split: str, result: Evaluation) -> None:
    """Add an evaluation on one split ("train", "test" or :data:`HELD_OUT`) to a record."""
    prefix = _PREFIX[split]
    metrics[prefix + NUM_EXAMPLES] = result.num_examples
    metrics[prefix + LOSS] = result.loss
    metrics[prefix + ACCURACY] = result.accuracy


def get_evaluations(message: Message) -> dict[str, Evaluation]:
    """Return the evaluations in a reply, by split."""
    metrics, found = metrics_of(message), {}
    for split, prefix in _PREFIX.items():
        if prefix + ACCURACY in metrics:
            found[split] = Evaluation(
                loss=metrics[prefix + LOSS],
                accuracy=metrics[prefix + ACCURACY],
                num_examples=metrics[prefix + NUM_EXAMPLES],
            )
    return found


def fault_of(message: Message, reply: object) -> str:
    """Return what is wrong with the form of a reply, in one line; empty if nothing is.

    A model, and SCAFFOLD's change of a variate, must have the names, shapes and types of what was
    sent: an array of shape (1,), or of float64, would be averaged without a word. A loss that is
    not finite is no fault of form: it is what a model that diverged has.
    """
    if not isinstance(reply, Message):
        return f"its reply is a {type(reply).__name__}, not a Message"
    asked, came = message.metadata, reply.metadata
    if (came.reply_to_message_id, came.group_id) != (asked.message_id, asked.group_id):
        return "its reply is not to the message that it was sent"
    if not reply.has_content():
        return reply.error.reason or "it replied with an error"
    if asked.message_type not in (MessageType.TRAIN, MessageType.EVALUATE):
        return ""
    if METRICS not in reply.content.metric_records:
        return f"its reply has no metrics (a MetricRecord named {METRICS!r})"
    metrics, config = metrics_of(reply), config_of(message)
    if asked.message_type == MessageType.EVALUATE:
        faults = (_fault_of_evaluation(metrics, _PREFIX[split]) for split in config[SPLITS])
        return next(filter(None, faults), "")
    return (
        _fault_of_arrays(message, reply, ARRAYS)
        or _fault_of_arrays(message, reply, VARIATE)
        or _fault_of_count(metrics, NUM_EXAMPLES, 1)
        or _fault_of_number(metrics, LOSS)
        or _fault_of_number(metrics, SECONDS, math.inf)
        or _fault_of_class_counts(metrics, config.get(CLASS_COUNTS, 0))
    )


def _fault_of_arrays(message: Message, reply: Message, name: str) -> str:
    sent, came = (dict(m.content.array_records.get(name, {})) for m in (message, reply))
    if differing := sorted(sent.keys() ^ came.keys()):
        which = "lacks" if differing[0] in sent else "has, and was not sent,"
        return f"its reply {which} the array {differing[0]!r} of {name!r}"
    for key, array in sent.items():
        expected = np.dtype(array.dtype), tuple(array.shape)
        try:
            form = (found := _from_flower(came[key])).dtype, found.shape
        except Exception as error:  # numpy raises all kinds for bytes that are no array
            return f"the array {key!r} of {name!r} in its reply cannot be read: {error}"
        if form != expected:
            (got, got_shape), (dtype, shape) = form, expected
            return (
                f"the array {key!r} of {name!r} in its reply is {got} of shape {got_shape}, "
                f"and was sent as {dtype} of shape {shape}"
            )
    return ""


def _fault_of_evaluation(metrics: Mapping[str, Any], prefix: str) -> str:
    return (
        _fault_of_count(metrics, prefix + NUM_EXAMPLES, 0)
        or _fault_of_number(metrics, prefix + LOSS)
        or _fault_of_number(metrics, prefix + ACCURACY, 1.0)
    )


def _fault_of_count(metrics: Mapping[str, Any], key: str, least: int) -> str:
    value = metrics.get(key)
    if type(value) is int and least <= value <= _MOST:
        return ""
    shown = reprlib.repr(value)
    return f"{key!r} in its reply is {shown}, and must be a whole number of at least {least}"


def _fault_of_number(metrics: Mapping[str, Any], key: str, most: float | None = None) -> str:
    """Complain of what is no number, negative, or more than ``most`` (and then not finite)."""
    value = metrics.get(key)
    allowed = "a number that is not negative"
    if type(value) is float or (type(value) is int and value <= _MOST):
        if not value < 0 and (most is None or (math.isfinite(value) and value <= most)):
            return ""
        allowed = allowed if most in (None, math.inf) else f"0 to {most:g}"
    return f"{key!r} in its reply is {reprlib.repr(value)}, and must be {allowed}"


def _fault_of_class_counts(metrics: Mapping[str, Any], classes: int) -> str:
    if not classes:
        return ""
    counts = metrics.get(CLASS_COUNTS)
    if (
        isinstance(counts, list)
        and len(counts) == classes
        and all(type(n) is int and n >= 0 for n in counts)
        and sum(counts) == metrics[NUM_EXAMPLES]
    ):
        return ""
    return (
        f"{CLASS_COUNTS!r} in its reply is {reprlib.repr(counts)}, and must be {classes} whole "
        f"numbers that sum up to its {metrics[NUM_EXAMPLES]} examples"
    )


def not_finite(reply: Message) -> str:
    """Return what of a reply to train is not finite, in words; empty if nothing is."""
    sent = [r for name in (ARRAYS, VARIATE) if (r := reply.content.array_records.get(name))]
    if not all(np.isfinite(a).all() for record in sent for a in to_arrays(record).values()):
        return "its model is not finite"
    return "" if math.isfinite(metrics_of(reply)[LOSS]) else "its loss is not finite"
