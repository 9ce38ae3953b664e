"""The architecture's one statement: the floors of the trainer's rooms, and what each module may import.

docs/design.md shows the same list.
"""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "amopo_fast"
KERNELS = ROOT / "kernels" / "amopo_kernels"

# From the ground up: a room imports from floors below its own and from itself, nothing else of the trainer.
FLOORS = (
    ("errors", "hub", "text_files", "report", "optim"),  # and amopo_kernels
    ("data",),
    ("prompts",),
    ("packing", "survival"),
    ("models",),
    ("memory", "integrations", "judges"),
    ("training",),
    ("evaluation", "demo"),
    ("cli",),
)
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS, start=1) for room in rooms}


def modules(folder: Path) -> dict[str, Path]:
    """{"data.pairs": path} of a package, without its own __init__."""
    result = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts:
            result[".".join(parts)] = path
    return result


MODULES = modules(PACKAGE)


@functools.cache
def imports(name: str) -> set[str]:
    """Modules of amopo_fast that a module imports anywhere: in functions and for type checking too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level:
            target = node.module.split(".")
            names = [".".join([*target, alias.name]) for alias in node.names if alias.name != "__version__"]
            known = [each for each in names if each.removeprefix("amopo_fast.") in MODULES]
            found |= set(known) | ({node.module} if len(known) < len(names) else set())
        elif isinstance(node, ast.ImportFrom):
            pytest.fail(f"{name}: write absolute imports")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    inside = {each for each in found if each == "amopo_fast" or each.startswith("amopo_fast.")}
    return {each.removeprefix("amopo_fast").lstrip(".") for each in inside}


def test_every_room_has_its_floor():
    assert {name.split(".")[0] for name in MODULES} == set(FLOOR_OF)


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_down(name):
    room = name.split(".")[0]
    up = []
    for target in imports(name):
        other = target.split(".")[0]
        if not other:
            up.append("amopo_fast itself, which knows all rooms")
        elif other != room and FLOOR_OF[other] >= FLOOR_OF[room]:
            up.append(target)
    assert not up, f"{name} (floor {FLOOR_OF[room]}) imports {', '.join(up)}"


def test_no_module_is_part_of_a_circle():
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for target in imports(name) if name in MODULES else ():
                walk(target, (*path, name))
            done.add(name)

    for name in MODULES:
        walk(name, ())


def test_the_kernels_know_nothing_of_the_trainer():
    others = "amopo_fast|transformers|peft|datasets|matplotlib|liger_kernel"
    forbidden = re.compile(rf"^\s*(?:from|import) ({others})\b", re.M)
    for path in KERNELS.rglob("*.py"):
        assert not forbidden.search(path.read_text(encoding="utf-8")), path


def test_no_file_is_too_long():
    files = [path for folder in ("amopo_fast", "kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {name: length for name, length in lengths.items() if length > 400}


def test_the_design_page_shows_the_floors():
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    listed = re.findall(r"^    floor (\d+) +(.*?)(?:  .*)?$", page, re.M)
    assert [tuple(re.findall(r"\w+", rooms)) for _, rooms in listed] == list(FLOORS)
    assert [int(number) for number, _ in listed] == list(range(1, len(FLOORS) + 1))
