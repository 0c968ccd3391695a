"""The README's example of bringing one's own data, as it stands there."""

import re
import shlex
import subprocess
import sys

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
