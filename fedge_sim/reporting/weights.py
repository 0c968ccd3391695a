"""The models of the last finished round, as safetensors, with a note that says how to load."""

from pathlib import Path

from safetensors.numpy import save_file

from fedge_sim.algorithms import Arrays
from fedge_sim.reporting.base import Callback, RoundRecord, RunInfo
from fedge_sim.reporting.tables import write_json

# How to load a model: the capital names stand for this file's values, FILE for a file beside it,
# x is a float32 tensor (windows, channels, samples) in the units of the sensors.
LOAD = (
    "import torch; from fedge_sim.models import build_model; "
    "from safetensors.torch import load_file; "
    "model = build_model(NAME, WINDOW_SHAPE, NUM_CLASSES); "
    "model.load_state_dict(load_file(FILE)); model.eval(); "
    "logits = model((x - torch.tensor(MEAN)[:, None]) / torch.tensor(STD)[:, None])"
)


class WeightWriter(Callback):
    """Writes ``models/`` into the results folder: global, one for each cluster, models.json."""

    def on_run_start(self, info: RunInfo) -> None:
        """Make the folder, and keep what a reader of the models needs."""
        self._folder = info.folder / "models"
        self._folder.mkdir()
        self._form = {
            "name": info.settings.data.model,
            "window_shape": info.data.window_shape,
            "num_classes": len(info.data.classes),
            "classes": info.data.classes,
            "mean": info.data.mean,
            "std": info.data.std,
        }

    def on_round_end(self, record: RoundRecord) -> None:
        """Replace the models by those of this round; a kill leaves a whole file of each."""
        state = record.cloud
        _save(self._folder / "global.safetensors", state.global_model)
        for k, model in enumerate(state.cluster_models):
            _save(self._folder / f"cluster_{k}.safetensors", model)
        write_json(
            self._folder / "models.json",
            {
                "round": record.global_round,
                **self._form,
                "clusters": {
                    f"cluster_{k}.safetensors": {"leaf_servers": state.members(k)}
                    for k in range(len(state.cluster_models))
                },
                "load": LOAD,
            },
        )
        for file in self._folder.glob("cluster_*.safetensors"):
            if int(file.stem.removeprefix("cluster_")) >= len(state.cluster_models):
                file.unlink()


def _save(file: Path, model: Arrays) -> None:
    aside = file.with_suffix(".tmp")
    save_file(dict(model), aside)
    aside.replace(file)
