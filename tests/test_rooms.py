"""Which room may import which library, as the design says."""

import ast

from tests.conftest import ROOT

PACKAGE = ROOT / "fedge_sim"
FLWR = {"leaf.py", "leaf_strategy.py", "client_app.py", "server_app.py", "records.py", "runtime"}


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


def test_only_some_rooms_know_flower_and_only_the_runtime_knows_ray():
    rooms = {}
    for file in PACKAGE.rglob("*.py"):
        rooms.setdefault(file.relative_to(PACKAGE).parts[0], set()).update(imported(file))
    assert {room for room, names in rooms.items() if "flwr" in names} == FLWR
    assert {room for room, names in rooms.items() if "ray" in names} == {"runtime"}


# From the ground up; what stands on one line stands on one floor.
FLOORS = [
    {"errors", "memory", "sealed"},
    {
        *("config", "config_types", "config_devices", "combinations", "unread", "unknown"),
        *("methods", "randomness"),
    },
    {"algorithms", "models", "training", "data", "checkpoint"},
    {"cloud", "records"},
    {"reporting", "runtime", "client", "client_app", "leaf", "leaf_strategy", "member"},
    {"orchestrator", "device_run", "earlier", "monitor"},
    {"server_app", "compare"},
]


def own_imports(file):
    """Return the rooms of this package that a module imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "fedge_sim":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fedge_sim."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            parts = (alias.name.split(".") for alias in node.names)
            yield from (p[1] for p in parts if p[0] == "fedge_sim" and len(p) > 1)


def test_a_room_imports_only_from_its_own_floor_or_below():
    floor = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
    seen = set()
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for other in own_imports(file):
            seen.add(other)
            assert floor[other] <= floor[room], f"{file}: {room} imports {other}"
    assert seen == floor.keys() - {"server_app", "monitor", "compare"}
