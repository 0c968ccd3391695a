"""Any strategy of Flower's as the aggregation rule of a leaf server, used and not rewritten."""

import inspect
import logging
import random
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from functools import partial
from typing import Any, cast, get_args

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid, strategy
from flwr.serverapp.strategy import FedAvg, MultiKrum, Strategy
from flwr.supercore.task_identity import TaskIdentity

from fedge_sim import records
from fedge_sim.algorithms import Arrays
from fedge_sim.algorithms.aggregation import weighted_mean
from fedge_sim.config import Hierarchy
from fedge_sim.errors import ConfigError, RoundError, suggest
from fedge_sim.models.tracker import forget_tracked

log = logging.getLogger(__name__)

# What a strategy is told so that it takes every client it is shown, and finds what it is sent.
_GIVEN: dict[str, Any] = {
    **{"fraction_train": 1.0, "min_train_nodes": 1, "min_available_nodes": 1},
    **{"weighted_by_key": records.NUM_EXAMPLES, "train_loss_key": records.LOSS},
    **{"arrayrecord_key": records.ARRAYS, "configrecord_key": records.CONFIG},
}
_TRIAL = 1000  # the most clients with which a strategy is tried out before the run
_RECORD = "ArrayRecord"  # the key of one in a state


class LeafRule:
    """A strategy of Flower's, and what it remembers, for one leaf server.

    Each client that sent an update is a node to the strategy, and its update a reply. A strategy
    that steps from the current model (FedAdam and its like, FedAvgM, QFedAvg) sees the trainable
    arrays: a step could make BatchNorm's variance negative. Any other sees all floating arrays,
    so that no poisoned buffer gets past it. The rest is averaged by :func:`weighted_mean`.

    The strategy computes in float64: in float32 the squared distances of Krum cancel or overflow.

    Parameters
    ----------
    hierarchy : Hierarchy
        ``leaf_strategy`` is the name of the class, and ``leaf_strategy_options`` are arguments
        of its own. QFedAvg's ``client_learning_rate`` is ``lr_init`` if not given.
    trainable : set of str
        Names of the model's trainable arrays.

    Raises
    ------
    ConfigError
        If the strategy or an option is none for a leaf server, or if it fails on a toy with as
        many clients as the smallest leaf server has in a round.
    """

    def __init__(self, hierarchy: Hierarchy, trainable: Set[str]) -> None:
        self._name, self._trainable = hierarchy.leaf_strategy, trainable
        cls = _class(self._name)
        parameters = inspect.signature(cls).parameters
        given = {**_GIVEN, "client_learning_rate": hierarchy.lr_init}
        given = {key: value for key, value in given.items() if key in parameters}
        options = hierarchy.leaf_strategy_options
        _check_options(cls, options)
        self._make = partial(cls, **(given | options))
        try:
            self._strategy = self._make()
        except (TypeError, ValueError) as error:
            problem = f"{self._name} refuses: {error}"
            raise ConfigError.at("hierarchy", "leaf_strategy_options", options, problem) from None
        self._fresh = dict(vars(self._strategy))
        self._try(hierarchy.participants(min(hierarchy.clients_per_server)))

    def aggregate(
        self,
        server_round: int,
        start: Arrays,
        updates: Mapping[int, Arrays],
        weights: Mapping[int, float],
        losses: Mapping[int, float],
    ) -> Arrays:
        """Return the leaf's next model.

        Parameters
        ----------
        server_round : int
            Counted from 1 over the whole run: FedAdam's rate depends on it.
        start : Arrays
            The model that the clients started from.
        updates : mapping of int to Arrays
            By client, with the start's names and shapes.
        weights, losses : mapping of int to float
            By client: its weight in the average, and its training loss.

        Returns
        -------
        Arrays
            With the start's names, order, types and shapes. It does not depend on the order of
            the updates.

        Raises
        ------
        RoundError
            If the strategy fails, gives no model (too few clients) or one that is not finite.
        """
        clients = sorted(updates)
        seen = {name: array for name, array in start.items() if self._sees(name, array)}
        rest = [{n: updates[c][n] for n in start if n not in seen} for c in clients]
        model = dict(weighted_mean(rest, [weights[client] for client in clients]))
        model |= _step(self._strategy, server_round, seen, updates, weights, losses)
        return forget_tracked({name: model[name] for name in start})

    def state(self) -> dict[str, Any]:
        """Return what the strategy remembers between rounds, for a checkpoint.

        Returns
        -------
        dict
            A tree of dicts and lists of arrays, numbers, str and None; no array is shared with
            the strategy.
        """
        memory = {
            name: _plain(value)
            for name, value in vars(self._strategy).items()
            if value is not self._fresh.get(name, self)  # or changed in place:
            or isinstance(value, dict | list | np.ndarray | ArrayRecord)
        }
        return {"strategy": self._name, "memory": memory}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` returned, as if there had been no break.

        Raises
        ------
        ConfigError
            If the state is another strategy's.
        """
        if state["strategy"] != self._name:
            problem = f"the run that goes on had {state['strategy']!r}"
            raise ConfigError.at("hierarchy", "leaf_strategy", self._name, problem)
        self._strategy = self._make()
        self._fresh = dict(vars(self._strategy))
        for name, value in state["memory"].items():
            setattr(self._strategy, name, _from_plain(value))

    def _sees(self, name: str, array: np.ndarray[Any, Any]) -> bool:
        if hasattr(self._strategy, "current_arrays"):  # it steps from them
            return name in self._trainable
        return np.issubdtype(array.dtype, np.floating)

    def _try(self, clients: int) -> None:
        """Let a strategy that is thrown away do a round of a toy."""
        if clients > _TRIAL:  # Krum's distances grow with the square
            return
        updates = {client: {"w": np.array([1.0, client])} for client in range(clients)}
        ones = dict.fromkeys(updates, 1.0)
        try:
            _step(self._make(), 1, {"w": np.zeros(2)}, updates, ones, ones)
        except RoundError as error:
            problem = f"cannot be used with {clients} clients in a round: {error}"
            raise ConfigError.at("hierarchy", "leaf_strategy", self._name, problem) from error


def allowed() -> list[str]:
    """Return the names of the strategies that a leaf server can use, of the Flower installed."""
    return sorted(name for name in strategy.__all__ if not _refusal(name))


def _refusal(name: str) -> str:
    """Return why a public name of Flower's strategies is none for a leaf server, or ``""``."""
    cls = getattr(strategy, name)
    if not issubclass(cls, Strategy) or inspect.isabstract(cls):
        return "is no strategy that aggregates"
    if "strategy" in inspect.signature(cls).parameters:
        return "wraps another strategy, and does not aggregate by itself"
    if name.startswith("FedXgb"):
        return "aggregates boosted trees, and models here are arrays"
    if name == "FedProx":
        return "its proximal term is hierarchy.prox_mu here, and goes with any leaf_strategy"
    return ""


def _class(name: str) -> type[Strategy]:
    """Return a strategy's class, or say why it is refused."""
    if name not in strategy.__all__:
        problem = f"is no strategy of Flower's: {_choice(name, allowed())}"
    elif reason := _refusal(name):
        problem = f"{reason}; allowed: {', '.join(allowed())}"
    else:
        return cast("type[Strategy]", getattr(strategy, name))
    raise ConfigError.at("hierarchy", "leaf_strategy", name, problem)


def _check_options(cls: type[Strategy], options: Mapping[str, object]) -> None:
    """Refuse options that a strategy's class has not, or has of another type.

    Those of FedAvg are set here: which clients take part is ``hierarchy.participation``.
    """
    set_here = {*inspect.signature(FedAvg).parameters, *_GIVEN}
    own = {
        name: kinds
        for name, p in inspect.signature(cls, eval_str=True).parameters.items()
        if name not in set_here
        and (kinds := {p.annotation, *get_args(p.annotation)} & {bool, int, float, str})
    }
    for name, value in options.items():
        if name not in own:
            problem = f"is no option of {cls.__name__}"
            problem += f": {_choice(name, own)}" if own else ", which has none"
        elif not {type(value)} & (own[name] | ({int} if float in own[name] else set())):
            problem = "must be " + " or ".join(sorted(kind.__name__ for kind in own[name]))
        else:
            continue
        raise ConfigError.at("hierarchy.leaf_strategy_options", name, value, problem)


def _choice(word: str, known: Iterable[str]) -> str:
    """Return all known words, after the closest one if there is any."""
    every = f"allowed: {', '.join(sorted(known))}"
    return every if (hint := suggest(word, known)) == every else f"{hint} {every}"


class _Clients:
    """What a strategy asks of a Grid when it configures a round: its nodes."""

    def __init__(self, node_ids: list[int]) -> None:
        self._node_ids = node_ids

    def get_node_ids(self) -> list[int]:
        return self._node_ids


def _step(
    rule: Strategy,
    server_round: int,
    start: Arrays,
    updates: Mapping[int, Arrays],
    weights: Mapping[int, float],
    losses: Mapping[int, float],
) -> Arrays:
    """Let a strategy do one round on the start's arrays; see :meth:`LeafRule.aggregate`."""
    name, nodes = type(rule).__name__, {client: client + 1 for client in sorted(updates)}
    malicious = rule.num_malicious_nodes if isinstance(rule, MultiKrum) else 0
    if malicious and len(updates) < (needed := 2 * malicious + 3):  # Flower does not mind
        raise RoundError(
            f"{name} needs updates of 2 num_malicious_nodes + 3 = {needed} clients (Blanchard et "
            f"al. 2017), and got {len(updates)}"
        )
    with _flower_aside(server_round) as warnings, np.errstate(all="ignore"):
        try:
            grid = cast("Grid", _Clients(list(nodes.values())))
            asked = rule.configure_train(server_round, _double(start), ConfigRecord(), grid)
            messages = {message.metadata.dst_node_id: message for message in asked}
            replies = [
                records.reply(
                    messages[node],
                    arrays=_double({n: updates[client][n] for n in start}),
                    metrics=MetricRecord(
                        {
                            records.NUM_EXAMPLES: float(weights[client]),
                            records.LOSS: float(losses[client]),
                        }
                    ),
                )
                for client, node in nodes.items()
                if node in messages
            ]
            result, _ = rule.aggregate_train(server_round, replies)
        except Exception as error:
            raise RoundError(f"{name} failed: {type(error).__name__}: {error}") from error
        finally:
            # FedAvgM would step from its own last model, whatever the cloud made of it.
            if hasattr(rule, "current_arrays"):
                rule.current_arrays = None
        if result is None or result.keys() != start.keys():
            raise RoundError(f"{name} gave no model: {'; '.join(warnings) or 'no reason given'}")
        found = records.to_arrays(result)
        model = {n: found[n].astype(array.dtype) for n, array in start.items()}
    if not all(np.isfinite(array).all() for array in model.values()):
        raise RoundError(f"{name} gave a model that is not finite: its options may not be sound")
    for warning in warnings:
        log.warning("%s: %s", name, warning)
    return model


def _double(arrays: Arrays) -> ArrayRecord:
    return records.to_record({n: np.asarray(array, np.float64) for n, array in arrays.items()})


@contextmanager
def _flower_aside(seed: int) -> Iterator[list[str]]:
    """Make a strategy's calls possible outside Flower's loop, without a trace of them.

    A message can only be made in a process that has the identity of a task: a grid gives it,
    but none may be open yet. Nodes are drawn from the global random state, which is put back.
    Flower's log lines of each round are kept back, and its warnings given.
    """
    for key in ("task_id", "run_id", "node_id"):
        try:
            getattr(TaskIdentity, key)
        except RuntimeError:  # not set
            setattr(TaskIdentity, key, SUPERLINK_NODE_ID)
    warnings: list[str] = []

    def keep_back(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            warnings.append(record.getMessage())
        return False

    flower, random_state = logging.getLogger("flwr"), random.getstate()
    flower.addFilter(keep_back)
    random.seed(seed)
    try:
        yield warnings
    finally:
        random.setstate(random_state)
        flower.removeFilter(keep_back)


def _plain(value: object) -> Any:
    """Return what a strategy remembers as a tree of dicts, lists, arrays and plain values."""
    if isinstance(value, ArrayRecord):
        return {_RECORD: records.to_arrays(value)}
    if isinstance(value, np.ndarray | np.generic):
        return np.array(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a strategy's {type(value).__name__} cannot be kept in a checkpoint")


def _from_plain(value: Any) -> Any:
    """Return what :func:`_plain` was given."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, list):
        return [_from_plain(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {_RECORD}:
            return records.to_record(value[_RECORD])
        return {key: _from_plain(item) for key, item in value.items()}
    return value
