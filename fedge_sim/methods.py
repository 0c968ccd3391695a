"""The methods by name: which settings make each of them.

A method is a bundle of settings, and anything else may be set beside it: ``fedge`` with
``hierarchy.client_rule = "scaffold"`` is clustered SCAFFOLD.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Method:
    """A method that people compare.

    Attributes
    ----------
    title : str
        What tables and figures call it.
    source : str
        Where it is from.
    topology : str
        Where the clients are: ``"hierarchy"``, under the leaf servers that are set; ``"flat"``,
        all under one; ``"clients"``, each under a leaf server of its own, so that the cloud
        deals with clients.
    settings : mapping of str to object
        Values by path, as ``hierarchy.client_rule``.
    bound : bool
        Whether it is there to be compared with, and not to be the best.
    """

    title: str
    source: str
    topology: Literal["hierarchy", "flat", "clients"]
    settings: Mapping[str, object] = field(default_factory=dict)
    bound: bool = False

    def clients_per_server(self, hierarchy: Sequence[int]) -> tuple[int, ...]:
        """Return how many clients each leaf server has, from how many it has in a hierarchy."""
        clients = sum(hierarchy)
        flat = {"flat": (clients,), "clients": (1,) * clients}
        return flat.get(self.topology, tuple(hierarchy))

    def assignments(self, clients_per_server: Sequence[int]) -> list[str]:
        """Return the method's settings as ``table.key=value``.

        Parameters
        ----------
        clients_per_server : sequence of int
            Of the hierarchy that the clients are taken from.
        """
        per_server = self.clients_per_server(clients_per_server)
        topology = {
            "hierarchy.num_servers": len(per_server),
            "hierarchy.clients_per_server": per_server,
        }
        return [f"{path}={json.dumps(v)}" for path, v in {**topology, **self.settings}.items()]


# What makes a method that method is set even where it is the default, as a file may differ.
_PLAIN = {"hierarchy.client_rule": "sgd", "hierarchy.leaf_strategy": ""}
_NO_GATE = {"hierarchy.cluster_better_delta": -1.0}  # the accuracy gate is Fedge's
_ONE_MODEL = {**_PLAIN, **_NO_GATE, "cloud_cluster.enable": False}
_CLUSTERED = {**_PLAIN, "cloud_cluster.enable": True}
_FLAT = {**_ONE_MODEL, "hierarchy.prox_mu": 0.0}


def _rule(name: str, **more: object) -> dict[str, object]:
    own = {f"hierarchy.{key}": value for key, value in more.items()}
    return {**_FLAT, "hierarchy.client_rule": name, **own}


METHODS: dict[str, Method] = {
    "local": Method("Local only", "lower bound", "flat", _rule("local"), bound=True),
    "centralised": Method("Centralised", "upper bound", "flat", _rule("centralised"), bound=True),
    "fedavg": Method("FedAvg", "McMahan et al. 2017", "flat", _FLAT),
    "fedprox": Method(
        "FedProx",
        "Li et al. 2020",
        "flat",
        {**_FLAT, "hierarchy.prox_mu": 0.01, "hierarchy.prox_mu_decay": 1.0},
    ),
    # The variates' mean is a plain one, and so must be the models', or the optimum is missed.
    "scaffold": Method(
        "SCAFFOLD",
        "Karimireddy et al. 2020",
        "flat",
        _rule("scaffold", averaging="uniform"),
    ),
    "fedbn": Method("FedBN", "Li et al. 2021", "flat", _rule("fedbn")),
    "pfedme": Method("pFedMe", "Dinh et al. 2020", "flat", _rule("pfedme", averaging="uniform")),
    "cfl": Method(
        "CFL",
        "Sattler et al. 2020",
        "clients",
        {
            **_CLUSTERED,
            **_NO_GATE,
            "cloud_cluster.method": "cfl",
            "hierarchy.prox_mu": 0.0,
        },
    ),
    "hierfl": Method("HierFL", "Fedge without clusters or gate", "hierarchy", _ONE_MODEL),
    "fedge": Method(
        "Fedge",
        "hierarchy, clustered by heads",
        "hierarchy",
        {
            **_CLUSTERED,
            "cloud_cluster.method": "cosine_similarity",
            "cloud_cluster.features": "head",
        },
    ),
}
