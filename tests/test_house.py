"""Which room may know which, and how long a page may be.    python -m pytest tests/test_house.py"""
import ast
import os

import pytest
from conftest import ROOT

ROOMS = {}  # module -> its tree
for folder in (".", "kernels", "world", "tools"):
    for file in os.listdir(os.path.join(ROOT, folder)):
        if file.endswith(".py"):
            path = os.path.normpath(os.path.join(folder, file))
            name = path[:-3].replace(os.sep, ".").removesuffix(".__init__")
            ROOMS[name] = ast.parse(open(os.path.join(ROOT, path)).read())
SCRIPTS = {name for name, tree in ROOMS.items() if any(isinstance(n, ast.If) and "__main__" in ast.dump(n) for n in tree.body)}


def imports_of(name):
    """The rooms that a room imports, its own package aside."""
    found = set()
    for node in ast.walk(ROOMS[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {other for other in found if other in ROOMS and other != name.split(".")[0]}


def reached_from(name):
    reached, new = set(), imports_of(name)
    while new:
        reached |= new
        new = set().union(*(imports_of(other) for other in new)) - reached
    return reached


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_a_room_knows_what_it_may(name):
    known = imports_of(name)
    assert name not in reached_from(name), "an import circle"
    assert not known & (SCRIPTS - {"data"}), "imports a script; data.py alone is a room that also runs"
    assert not any(other.startswith("tools.") for other in known) or name.startswith("tools."), "imports a tool"
    if name == "alpamayo":
        assert {other.split(".")[0] for other in known} == {"doors", "kernels", "release"}
    if name == "release":
        assert known == {"doors"}
    if name == "doors" or (name.startswith("kernels") and name != "kernels.bench"):
        assert all(other.startswith("kernels") for other in known)


def test_the_model_file_is_a_page():
    lines = open(os.path.join(ROOT, "alpamayo.py")).read().splitlines()
    assert len(lines) <= 1800
    assert next(i for i, line in enumerate(lines) if line.startswith("class Alpamayo")) < 300
