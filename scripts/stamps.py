"""What a side of a benchmark notes in its folder: when its run and its rounds begin and end.

Without a library, so that a side that needs none loads none.
"""

import json
import time
from pathlib import Path

STAMPS, BEGUN = "stamps.jsonl", "begun"


def stamp(folder: Path) -> None:
    """Note the time; a side does so when its first round starts and when each has ended."""
    with (folder / STAMPS).open("a") as file:
        file.write(json.dumps({"time": time.time()}) + "\n")


def begin(folder: Path) -> None:
    """Note that a side's run begins: its program is loaded."""
    (folder / BEGUN).write_text(str(time.time()))
