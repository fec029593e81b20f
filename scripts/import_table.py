"""Print which rooms of a package import which: levels, arrows, and arrows against the levels of docs/architecture.md.

python scripts/import_table.py [PACKAGE FOLDER]
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
ARCHITECTURE = ROOT / "docs" / "architecture.md"


class Room(NamedTuple):
    """A row of the table of levels."""

    level: int
    may_import: frozenset[str]


def stated_rooms(document: Path = ARCHITECTURE) -> dict[str, Room]:
    """Read the table of levels: room by name."""
    rows = re.findall(
        r"^\| (\d) \| `(\w+)` \|[^|]*\| ?([\w, ]*) ?\|$", document.read_text(encoding="utf-8"), re.MULTILINE
    )
    return {name: Room(int(level), frozenset(re.findall(r"\w+", allowed))) for level, name, allowed in rows}


def modules(package: Path) -> dict[str, Path]:
    """Every module below `package`, by its dotted name within the package."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name:
            found[name] = path
    return found


def imports_of(path: Path, known: set[str], package: str = "singerembed") -> set[str]:
    """The modules of `package` that the file `path` imports, wherever in it the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package:
            base = node.module.removeprefix(package).lstrip(".")
            for alias in node.names:
                joined = f"{base}.{alias.name}".lstrip(".")
                names.add(joined if joined in known or not base else base)
        elif isinstance(node, ast.Import):
            names |= {a.name.removeprefix(f"{package}.") for a in node.names if a.name.startswith(f"{package}.")}
    return {name for name in names if name in known}


def import_graph(package: Path) -> dict[str, set[str]]:
    """Which modules of the package each of its modules imports."""
    found = modules(package)
    return {name: imports_of(path, set(found), package.name) - {name} for name, path in found.items()}


def room_graph(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same between rooms: the first part of a module's name."""
    rooms: dict[str, set[str]] = defaultdict(set)
    for name, imported in graph.items():
        room = name.partition(".")[0]
        rooms[room] |= {other.partition(".")[0] for other in imported} - {room}
    return dict(rooms)


def depth(graph: dict[str, set[str]]) -> int | None:
    """How many levels the graph has; None if imports form a circle."""
    levels: dict[str, int] = {}
    while len(levels) < len(graph):
        ready = [name for name in graph if name not in levels and graph[name] <= levels.keys()]
        if not ready:
            return None
        levels |= {name: 1 + max((levels[other] for other in graph[name]), default=0) for name in ready}
    return max(levels.values(), default=0)


def against_levels(rooms: dict[str, set[str]], stated: dict[str, Room]) -> list[str]:
    """Imports that the table does not allow, or that do not lead to a lower level."""
    wrong = []
    for room, imported in rooms.items():
        if room == "__main__":
            continue
        if room not in stated:
            wrong.append(f"{room} is not in the table of levels")
            continue
        wrong += [f"{room} imports {other}" for other in sorted(imported) if other not in stated[room].may_import]
    for room, row in stated.items():
        for other in sorted(row.may_import):
            if other not in stated or stated[other].level >= row.level:
                wrong.append(f"the table lets {room} import {other}, which does not lie below it")
    return wrong


def main() -> None:
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "singerembed"
    graph = import_graph(package)
    rooms = room_graph(graph)
    for name, each in (("modules", graph), ("rooms", rooms)):
        arrows = sum(map(len, each.values()))
        print(f"{len(each)} {name}, {arrows} arrows, {depth(each) or 'no'} levels")
    wrong = against_levels(rooms, stated_rooms())
    print(f"{len(wrong)} arrows against the levels of {ARCHITECTURE.relative_to(ROOT)}")
    for line in wrong if len(sys.argv) < 2 else []:
        print(f"  {line}")
    for room in sorted(rooms, key=lambda name: -len(rooms[name])):
        print(f"  {room:<12} -> {', '.join(sorted(rooms[room]))}")


if __name__ == "__main__":
    main()
