"""The README's example of bringing one's own data, as it stands there."""

import re
import shlex
import subprocess
import sys
from itertools import pairwise

from fedge_sim.config import load_settings
from tests.conftest import ROOT, clean_environment


def test_the_example_of_own_data_runs(tmp_path):
    section = (ROOT / "README.md").read_text().split("### Your own data")[1].split("\n### ")[0]
    script, command, images = re.findall(r"```(?:python)?\n(.*?)```", section, flags=re.DOTALL)
    assert "app.config.dataset=digits" in images
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[:3] == [".venv/bin/python", "-m", "fedge_sim.orchestrator"]
    done = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=tmp_path,
        env=clean_environment(PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    accuracy = re.search(r"models handed back: ([\d.]+)%", done.stdout)
    assert float(accuracy[1]) > 60  # of 3 classes
    assert len(list(tmp_path.glob("results/*_arrays_seed42/partition.json"))) == 1


def test_examples_of_fedbuff_have_a_buffer():
    """Of one update it would be no buffer: every update a version of its own."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^```\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line) for line in commands if "rule=fedbuff" in line]
    assert found
    for words in found:
        own = [after for word, after in pairwise(words) if word == "--set"]
        settings = load_settings(assignments=own)
        assert settings.by_versions
        assert 1 < settings.updates_for_model <= settings.devices.device_selection_size
