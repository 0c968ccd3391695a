"""Which room may import which library, as the design says."""

import ast

from tests.conftest import ROOT

PACKAGE = ROOT / "fedge_sim"
FLWR = {"leaf.py", "client_app.py", "server_app.py", "records.py", "runtime"}


def imported(file):
    """Return the top-level packages that a module imports when it runs."""
    tree = ast.parse(file.read_text())
    typing_only = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    names = set()
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_only_some_rooms_know_flower_and_none_knows_ray():
    rooms = {}
    for file in PACKAGE.rglob("*.py"):
        rooms.setdefault(file.relative_to(PACKAGE).parts[0], set()).update(imported(file))
    assert {room for room, names in rooms.items() if "flwr" in names} == FLWR
    assert not {room for room, names in rooms.items() if "ray" in names}


def test_pure_rooms_import_nothing_above_them():
    ground = {"__init__", "errors", "randomness", "config"}
    for room in ("algorithms", "training", "models", "data"):
        for file in (PACKAGE / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                    "fedge_sim."
                ):
                    assert node.module.split(".")[1] in ground | {room}, file
