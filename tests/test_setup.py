"""``make`` sets the environment up: what is seen of it, and that a failure is one."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = 43

FAKE_PYTHON = f"""#!/bin/sh
# Stands for: python -m venv --clear .venv, and then for .venv/bin/pip.
case "$0" in
*pip)
    for n in $(seq {PACKAGES}); do
        echo "Collecting package-$n<2,>=1 (from fedge-sim==0.1.0)"
        echo "  Downloading package_$n-1.0-py3-none-any.whl (1.0 MB)"
    done
    echo "Processing /somewhere/wheel-1.0.whl (from fedge-sim==0.1.0)"
    echo "WARNING: a warning" >&2
    if [ -n "$FAILS" ]; then echo "ERROR: no matching distribution" >&2; exit 3; fi
    echo "Installing collected packages: package-1, package-2"
    echo "Successfully installed package-1-1.0 package-2-1.0" ;;
*)
    mkdir -p .venv/bin && cp "$0" .venv/bin/pip ;;
esac
"""


@pytest.mark.parametrize("fails", ["", "yes"])
def test_setting_up_shows_how_far_it_is_and_fails_where_pip_does(tmp_path: Path, fails):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    done = subprocess.run(
        ["make", ".venv/ready", f"PYTHON={python}"],
        cwd=tmp_path,
        env={**os.environ, "FAILS": fails},
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert any(line.startswith("installing about 1") for line in lines)
    assert [line for line in lines if "found: " in line] == [
        f"{n} packages found: package-{n}<2,>=1" for n in (10, 20, 30, 40)
    ]
    assert "WARNING: a warning" in done.stderr
    assert (done.returncode == 0) == (not fails)
    assert (tmp_path / ".venv" / "ready").exists() == (not fails)
    if fails:
        assert "ERROR: no matching distribution" in done.stderr
    else:
        assert f"{PACKAGES + 1} packages found; installing them" in lines
        assert f"{PACKAGES + 1} packages installed" in lines
