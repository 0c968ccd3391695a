"""The models of the last round or version, as safetensors, with a note that says how to load."""

from collections.abc import Sequence
from pathlib import Path

from safetensors.numpy import save_file

from fedge_sim.algorithms import Arrays
from fedge_sim.cloud import CloudState
from fedge_sim.reporting.base import Callback, RoundRecord, RunInfo
from fedge_sim.reporting.tables import write_json
from fedge_sim.runtime.rounds import Job

# How to load a model: the capital names stand for this file's values (MEAN and STD for those of
# one client where each has its own), FILE for a file beside it,
# x is a float32 tensor (examples, channels, ...) in the units of the dataset.
LOAD = (
    "import torch; from fedge_sim.models import build_model; "
    "from safetensors.torch import load_file; "
    "model = build_model(NAME, EXAMPLE_SHAPE, NUM_CLASSES); "
    "model.load_state_dict(load_file(FILE)); model.eval(); "
    "mean, std = (torch.tensor(v).view(-1, *[1] * (x.dim() - 2)) for v in (MEAN, STD)); "
    "logits = model((x - mean) / std)"
)


class WeightWriter(Callback):
    """Writes ``models/`` into the results folder: global, one for each cluster, models.json."""

    def on_run_start(self, info: RunInfo) -> None:
        """Make the folder, and keep what a reader of the models needs."""
        self._folder = info.folder / "models"
        self._folder.mkdir(exist_ok=True)
        self._form: dict[str, object] = {
            "name": info.settings.data.model,
            "example_shape": info.data.example_shape,
            "num_classes": len(info.data.classes),
            "classes": info.data.classes,
            "standardise": info.settings.data.standardise,
            **_scales(info),
        }
        if info.settings.hierarchy.client_rule in ("fedbn", "local"):
            self._form["note"] = (
                "what stays with the clients is not here (see state/): these arrays have their "
                "first values"
            )

    def on_round_end(self, record: RoundRecord) -> None:
        """Replace the models by those of this round; a kill leaves a whole file of each."""
        self._write(record.global_round, record.cloud)

    def on_versions_end(self, state: CloudState, left: Sequence[Job]) -> None:
        """Write the models of the last version, or of the cloud's last step."""
        self._write(state.global_round, state)

    def _write(self, number: int, state: CloudState) -> None:
        _save(self._folder / "global.safetensors", state.global_model)
        for k, model in enumerate(state.cluster_models):
            _save(self._folder / f"cluster_{k}.safetensors", model)
        write_json(
            self._folder / "models.json",
            {
                "round": number,
                **self._form,
                "clusters": {
                    f"cluster_{k}.safetensors": {"leaf_servers": state.members(k)}
                    for k in range(len(state.cluster_models))
                },
                "load": LOAD,
            },
        )
        for file in self._folder.glob("cluster_*.safetensors"):
            k_there = file.stem.removeprefix("cluster_")
            if k_there.isdecimal() and int(k_there) >= len(state.cluster_models):
                file.unlink()


def _scales(info: RunInfo) -> dict[str, object]:
    """Return mean and deviation of the channels: of all clients, or by client if they differ."""
    scales = info.data.scales
    if info.settings.data.standardise != "client":
        return {"mean": scales[0].mean.tolist(), "std": scales[0].std.tolist()}
    return {
        "mean": {client: scale.mean.tolist() for client, scale in enumerate(scales)},
        "std": {client: scale.std.tolist() for client, scale in enumerate(scales)},
    }


def _save(file: Path, model: Arrays) -> None:
    aside = file.with_suffix(".tmp")
    save_file(dict(model), aside)
    aside.replace(file)
