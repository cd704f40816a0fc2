"""The house rules that a machine can judge: what may import what, that light imports stay light, what is never read."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests import conftest

ROOT = Path(__file__).parents[1]
ROOMS = ("cluster", "memory_worker", "retrieval_worker", "generator_worker", "serving")
MAY_IMPORT = {
    "cluster": set(),
    "memory_worker": {"cluster"},
    "retrieval_worker": {"cluster"},
    "generator_worker": {"cluster"},
    "serving": set(ROOMS),
}
# The floors of a room, from the lowest: folders, and files at its root. Each imports of its room only what is on floors
# below its own. A file at the root that is not named here stands on the ground, below all of them. The other two rooms
# have no folders: of them only circles are looked for.
FLOORS = {
    "cluster": ("storage pools planning", "engine", "engine_server"),
    "memory_worker": ("models storage", "keeper memorize training", "catalog recall"),
    "serving": ("client documents", "router", "http", "deploy", "batch planning", "evaluation", "cli"),
}


@cache
def modules(*folders: str) -> dict[str, Path]:
    """Every module below these folders, by its name."""
    found = {}
    for folder in folders:
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def imported(file: Path) -> set[str]:
    """All that a file names in its imports, those inside functions too; not those for a type checker alone."""
    names: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(file.read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file.relative_to(ROOT)}: imports are written in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        waiting += ast.iter_child_nodes(node)
    return names


@cache
def arrows(*folders: str) -> dict[str, set[str]]:
    """Which modules each module of these folders imports of them."""
    known = modules(*folders)

    def module_of(name: str) -> str | None:
        """`a.b.c` may be the module c, or a name in the module a.b."""
        return name if name in known else name.rpartition(".")[0] if name.rpartition(".")[0] in known else None

    return {
        name: {found for each in imported(file) if (found := module_of(each)) and found != name}
        for name, file in known.items()
    }


def check_no_circle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("these import each other: " + " <- ".join(error.args[1]))


def part(module: str) -> str:
    """The folder of a room that a module is in, or the file at the room's root that it is."""
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_they_may(room):
    assert modules(room)
    for file in modules(room).values():
        strangers = {name.split(".")[0] for name in imported(file)} & set(ROOMS) - MAY_IMPORT[room] - {room}
        assert not strangers, f"{file.relative_to(ROOT)} imports {strangers}"


def test_no_modules_import_each_other():
    check_no_circle(arrows(*ROOMS))


def test_no_folders_import_each_other():
    graph: dict[str, set[str]] = {}
    for module, found in arrows(*ROOMS).items():
        graph.setdefault(part(module), set()).update(part(each) for each in found if part(each) != part(module))
    check_no_circle(graph)


@pytest.mark.parametrize("room", sorted(FLOORS))
def test_no_arrow_runs_back_up(room):
    floors = {f"{room}.{name}": number for number, names in enumerate(FLOORS[room], 1) for name in names.split()}
    folders = {f"{room}.{path.parent.name}" for path in (ROOT / room).glob("*/__init__.py")}
    code = {part(name) for name in modules(room)}
    assert folders & code <= floors.keys(), f"say in FLOORS on which floor {folders & code - floors.keys()} is"
    assert floors.keys() <= code, f"{floors.keys() - code} is in FLOORS and not in {room}/"
    for module, found in arrows(room).items():
        for each in found if module != room else ():  # the door of a room leads to any floor
            below = floors.get(part(each), 0) < floors.get(part(module), 0)
            ground = part(each) not in floors and part(module) not in floors
            assert below or ground or part(each) == part(module), f"{module} imports {each}, which is not below it"


def test_no_test_imports_a_test_and_nothing_else_imports_tests():
    for name, file in modules("tests").items():
        tests = {each for each in imported(file) if each.startswith("tests.") and not each.startswith("tests.support")}
        tests -= {"tests.conftest"} if file == Path(__file__) else set()
        assert not tests, f"{name} imports {tests}: what tests share stands in tests/support/"
    for name, file in modules(*ROOMS, "benchmarks", "examples", "docs").items():
        assert not [each for each in imported(file) if each.split(".")[0] == "tests"], f"{name} imports tests"


def test_what_starts_ray_or_a_server_is_in_a_group():
    """Two modules that each start one, on two workers, would be two too many for the machine."""
    starts = ("local_ray", "own_ray(", "run_scenario(", "Cluster(", "server: Server", "start_ray")
    for name, file in modules("tests").items():
        if name.rpartition(".")[2].startswith("test_") and name != __name__:
            text = file.read_text(encoding="utf-8")
            grouped = str(file.relative_to(ROOT)).startswith((*conftest.ON_RAY, *conftest.ON_THE_SERVER))
            assert grouped or not any(words in text for words in starts), f"tests/conftest.py has no group for {name}"


def test_no_module_is_called_utils():
    assert not [name for name in modules(*ROOMS, "benchmarks", "tests") if name.split(".")[-1] in ("utils", "helpers")]


@pytest.mark.parametrize("module", ["serving", "serving.config", "serving.cli.main", "serving.client.client"])
def test_light_imports_load_no_heavy_library(module):
    heavy = ("torch", "vllm", "ray", "transformers", "faiss")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert seen.stdout.strip() == "[]"


def test_nothing_that_can_run_code_is_read():
    forbidden = ("pickle.load", "torch.load(", "trust_remote_code=True", "yaml.load(", "eval(", "allow_pickle=True")
    for name, file in modules(*ROOMS).items():
        text = file.read_text(encoding="utf-8").replace(".eval()", "").replace("weights_only=True", "")
        assert not [word for word in forbidden if word in text], name
