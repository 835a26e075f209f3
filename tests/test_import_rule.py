"""One direction: gptcore knows no orchestrator, its rooms import only lower ones, one file knows MLflow."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SIDE = (
    "config",
    "store",
    "errors",
    "locks",
    "leftovers",
    "journal",
    "entry",
    "device",
    "timing",
    "parallel",
    "ranks",
    "usage",
    "resampling",
    "launch",
    "forkserver",
    "markdown",
)  # may be imported from anywhere
# A token's journey, in order; a room imports only rooms before it.
ROOMS = (
    "corpus",
    "vocab",
    "shards",
    "batches",
    "models",
    "optim",
    "weights",
    "checkpoint",
    "evaluate",
    "reciting",
    "train",
    "decoding",
    "generate",
    "quantize",
    "serve",
    "report",
    "studies",
    "nights",
)
# What training alone may need: a bare GPU box has no more.
BARE = {"torch", "numpy", "pydantic", "yaml", "safetensors"}


def source_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@cache
def imported_modules(path: Path) -> set[str]:
    """Dotted names of all imports in a file, at any depth of nesting."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported_modules(path)}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "gptcore").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", source_files("gptcore"), ids=lambda path: str(path.relative_to(ROOT)))
def test_gptcore_imports_no_layer_above_it(path: Path) -> None:
    assert not tops(path) & {"prefect", "mlflow", "gptloom"}


@pytest.mark.parametrize("path", source_files("gptcore"), ids=lambda path: str(path.relative_to(ROOT)))
def test_rooms_import_only_lower_rooms(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    assert room in ROOMS + SIDE, f"{path}: give the room {room} its place in a token's journey"
    wanted = {name.split(".")[1] for name in imported_modules(path) if name.startswith("gptcore.")} & set(ROOMS) - {room}
    rank = ROOMS.index(room) if room in ROOMS else -1
    above = {other for other in wanted if ROOMS.index(other) > rank}
    # The trainer samples nothing, the evaluator trains nothing: where two rooms want each other, the lower takes an argument.
    assert not above, f"{path.relative_to(ROOT)} imports {sorted(above)} from above"


def test_only_the_records_room_imports_mlflow() -> None:
    users = {path for package in ("gptcore", "tasks", "flows") for path in source_files(package) if "mlflow" in tops(path)}
    assert {str(path.parent.relative_to(ROOT)) for path in users} == {"tasks/records"}


# Above gptcore: a room imports those named with it, itself, and gptcore. Each names earlier ones only: no circle.
ABOVE: dict[str, set[str]] = {
    "tasks/records": set(),
    "tasks/runtime": {"tasks/records"},
    "tasks": {"tasks/runtime", "tasks/records"},
    "flows": {"tasks", "tasks/runtime", "tasks/records"},
    "flows/servers": {"tasks/runtime", "tasks/records"},
    "flows/command": {"flows", "flows/servers", "tasks", "tasks/runtime", "tasks/records"},
}


def test_rooms_above_form_no_circle() -> None:
    rooms = list(ABOVE)
    assert all(rooms.index(lower) < rooms.index(room) for room, wanted in ABOVE.items() for lower in wanted)


def top_level_imports(path: Path, modules: set[str]) -> set[str]:
    """Which of `modules` a file imports when it is loaded: not what stands in functions or is for type checkers only.

    `from package import module` wants the module; that it runs the package's own file first is so for any module of it.
    """
    names: set[str] = set()
    nodes: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= inner & modules
            names |= {node.module or ""} if inner - modules else set()
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            nodes += node.body + node.orelse
        elif isinstance(node, (ast.With, ast.Try)):
            nodes += node.body
    return names & modules


def test_no_module_imports_itself_through_others() -> None:
    files: dict[str, Path] = {}
    for package in ("gptcore", "tasks", "flows"):
        for path in source_files(package):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            files[name if package == "gptcore" else f"gptloom.{name}"] = path
    wanted = {name: top_level_imports(path, set(files)) - {name} for name, path in files.items()}
    # What imports nothing that is left is no part of a circle; what is left at the end is one, or waits for one.
    while free := {name for name, others in wanted.items() if not others & wanted.keys()}:
        wanted = {name: others for name, others in wanted.items() if name not in free}
    assert not wanted, {name: sorted(others & wanted.keys()) for name, others in wanted.items()}


@pytest.mark.parametrize("path", [*source_files("tasks"), *source_files("flows")], ids=lambda path: str(path.relative_to(ROOT)))
def test_upper_rooms_import_only_lower_rooms(path: Path) -> None:
    room = str(path.parent.relative_to(ROOT))
    assert room in ABOVE, f"{path}: say what the room {room} may import"
    wanted = set()
    for name in imported_modules(path):
        if name.startswith("gptloom."):
            parts = name.split(".")[1:]
            nested = "/".join(parts[:2])
            wanted.add(nested if nested in ABOVE else parts[0])
    wanted &= set(ABOVE)
    assert wanted <= ABOVE[room] | {room}, f"{path.relative_to(ROOT)} imports {sorted(wanted - ABOVE[room] - {room})}"


def test_nothing_imports_a_folder_of_the_checkout_by_its_bare_name() -> None:
    """`flows` and `tasks` may be a user's own folders; ours are gptloom.flows and gptloom.tasks."""
    users = [
        path
        for folder in ("gptcore", "tasks", "flows", "benchmarks", "tests")
        for path in source_files(folder)
        if tops(path) & {"flows", "tasks"}
    ]
    assert not users


FLOW_FILES = sorted((ROOT / "flows").glob("*.py"))


@pytest.mark.parametrize("path", FLOW_FILES, ids=lambda path: path.name)
def test_files_directly_in_flows_hold_a_flow(path: Path) -> None:
    if path.name in ("__init__.py", "run.py", "forms.py"):
        return
    decorators = [
        decorator.func if isinstance(decorator, ast.Call) else decorator
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
    ]
    assert any(isinstance(decorator, ast.Name) and decorator.id == "flow" for decorator in decorators)


@pytest.mark.parametrize(("module", "home"), [("tarfile", "gptcore/corpus/containers.py"), ("fcntl", "gptcore/locks.py")])
def test_one_module_only(module: str, home: str) -> None:
    """Tars are read with the same checks everywhere, locks taken in one way."""
    folders = ("gptcore", "tasks", "flows", "benchmarks")
    users = {path.relative_to(ROOT).as_posix() for folder in folders for path in source_files(folder) if module in tops(path)}
    assert users == {home}


def test_no_pickle() -> None:
    users = {
        str(path.relative_to(ROOT))
        for package in ("gptcore", "tasks", "flows")
        for path in source_files(package)
        if tops(path) & {"pickle", "cloudpickle", "joblib"}
    }
    assert not users


def test_training_needs_five_packages_only() -> None:
    """The module graph that `import gptcore.train` loads at once, by ast, so that no installed package can hide a new one."""
    seen: set[Path] = set()
    foreign: set[str] = set()
    queue = sorted((ROOT / "gptcore" / "train").glob("*.py"))
    while queue:
        path = queue.pop()
        if path in seen:
            continue
        seen.add(path)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:  # the top level: lazy imports are the point
            modules = (
                [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for module in modules:
                top = module.partition(".")[0]
                if top == "gptcore":
                    queue += [
                        p
                        for p in (ROOT / (module.replace(".", "/") + ".py"), ROOT / module.replace(".", "/") / "__init__.py")
                        if p.exists()
                    ]
                elif top not in sys.stdlib_module_names:
                    foreign.add(top)
    assert foreign <= BARE, f"training would need {sorted(foreign - BARE)} too"


@pytest.mark.integration
def test_flow_signature_is_light() -> None:
    """The Prefect worker imports the flow for every run: torch and mlflow there cost seconds each time."""
    code = "import sys, gptloom.flows.pipeline; sys.exit(bool({'torch', 'mlflow', 'pandas', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=240).returncode == 0


def test_a_class_name_stands_once() -> None:
    homes: dict[str, list[str]] = {}
    for package in ("gptcore", "tasks", "flows"):
        for path in source_files(package):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    homes.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


# "timing" is a file of every run and "rnn" a step of its own and a module's name, as well.
MAY_NAME = {"timing": 3, "quantization": 3, "rnn": 6}


@pytest.mark.parametrize("study", sorted(path.parent.name for path in (ROOT / "gptcore" / "studies").glob("*/__init__.py")))
def test_studies_are_named_by_their_folders(study: str) -> None:
    """Their names come from the folder: hardly any file says one."""
    said = [
        str(path.relative_to(ROOT))
        for package in ("gptcore", "tasks", "flows")
        for path in source_files(package)
        if f'"{study}"' in path.read_text(encoding="utf-8")
    ]
    assert len(said) <= MAY_NAME.get(study, 2), said
