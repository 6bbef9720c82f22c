"""The shape of the source tree, read from its syntax: who may import whom, and how large files are.

An arrow that points upwards compiles, runs and is found months later, when two rooms can no
longer be taken apart.
"""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, KERNELS, TESTS = ROOT / "sglang_vericache", ROOT / "kernels", ROOT / "tests"
BENCHMARKS = ROOT / "benchmarks"
LONGEST_FILE = 400

# From the bottom up; rooms of one line may import each other.
ORDER = (
    {"kernels"},
    {"loader"},
    {"compressors"},
    {"pool"},
    {"tree"},
    {"rounds", "draft", "verify", "plain"},
    {"worker"},
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
# Files beside the rooms that those below the fourth line may import.
GROUND = {"config", "metrics", "upload"}

FREE_OF_SGLANG = (
    *("config.py", "flags.py", "metrics.py", "server_fields.py", "compressors"),
    *("nearest.py", "sources.py", "request_options.py", "last_chunk.py"),
    *("phase_clock.py", "prometheus.py"),
    *("pool/allocator.py", "pool/rows.py", "pool/span.py", "pool/sizing.py"),
    *("tree/view_plan.py", "tree/span_table.py", "tree/view.py", "tree/view_builder.py"),
    *("loader", "forecast", "tree/residency.py"),
    *(
        "rounds/policy.py",
        "rounds/agreement.py",
        "rounds/batch.py",
        "rounds/costs.py",
        "rounds/controller.py",
        "rounds/pace.py",
        "rounds/stagger.py",
        "rounds/step_watch.py",
        "rounds/rotation.py",
        "rounds/rotation_costs.py",
        "rounds/rotation_setup.py",
        "rounds/draft_room.py",
    ),
    *("verify/accept.py", "verify/token_picker.py", "verify/cascade_groups.py"),
    "verify/cascade.py",
)


def module_of(path: Path) -> str:
    """Dotted name under which ``path`` is imported."""
    if path.is_relative_to(KERNELS):
        parts = ("sglang_vericache", "kernels", *path.relative_to(KERNELS).with_suffix("").parts)
    else:
        parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


SOURCES = {
    module_of(path): path
    for folder in (PACKAGE, KERNELS)
    for path in sorted(folder.rglob("*.py"))
    if not path.is_symlink()
}


def imports_in(tree: ast.AST, importer: str) -> set[str]:
    """Dotted names that ``tree`` imports, at any depth; ``from a import b`` counts as ``a.b``
    where that is a module of ours."""
    found = set()
    for item in ast.walk(tree):
        if isinstance(item, ast.Import):
            found |= {alias.name for alias in item.names}
        elif isinstance(item, ast.ImportFrom):
            assert item.level == 0, f"{importer} imports by dots"
            for alias in item.names:
                full = f"{item.module}.{alias.name}"
                found.add(full if full in SOURCES else item.module)
        elif isinstance(item, ast.Call) and ast.unparse(item.func).endswith("import_module"):
            found.add(ast.unparse(item.args[0]).strip("'\""))
    return found


IMPORTS = {name: imports_in(ast.parse(path.read_text()), name) for name, path in SOURCES.items()}


def room_of(module: str) -> str | None:
    """``pool`` of ``sglang_vericache.pool.span``; None outside the package."""
    parts = module.split(".")
    if parts[0] != "sglang_vericache":
        return None
    return parts[1] if len(parts) > 1 else ""


def top(modules: set[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


def reached_from(module: str) -> set[str]:
    """What importing ``module`` imports of ours in the end, itself included."""
    reached, ahead = set(), [module]
    while ahead:
        name = ahead.pop()
        if name not in reached and name in SOURCES:
            reached.add(name)
            ahead += IMPORTS[name]
    return reached


def free_modules() -> list[str]:
    wanted = [PACKAGE / name for name in FREE_OF_SGLANG]
    return [name for name, path in SOURCES.items() if path in wanted or path.parent in wanted] + [
        name for name in SOURCES if name.startswith("sglang_vericache.compressors.scorers")
    ]


def test_the_files_are_found():
    """Catches a moved folder, for which every test below would hold."""
    for name in FREE_OF_SGLANG:
        assert (PACKAGE / name).exists(), name
    assert set(RANK) <= {room_of(module) for module in SOURCES}
    assert len(free_modules()) >= len(FREE_OF_SGLANG)


@pytest.mark.parametrize("module", [name for name in SOURCES if room_of(name) == "kernels"])
def test_kernels_stand_alone(module):
    """Catches a kernel that could not be used, or tested, without the rest."""
    standard = {"__future__", "abc", "collections", "dataclasses", "enum", "functools", "math"}
    assert top(IMPORTS[module]) <= standard | {"typing", "torch", "triton", "sglang_vericache"}
    ours = {name for name in IMPORTS[module] if room_of(name) is not None}
    assert {room_of(name) for name in ours} <= {"kernels"}


@pytest.mark.parametrize("module", free_modules())
def test_free_of_sglang(module):
    """Catches decisions that cannot be tested without a server: no import of SGLang in the file
    itself, in a function or at the top, nor in anything of ours that it imports."""
    for reached in reached_from(module):
        assert "sglang" not in top(IMPORTS[reached]), f"by way of {reached}"


@pytest.mark.parametrize("module", [name for name in SOURCES if room_of(name) in RANK])
def test_no_arrow_points_upwards(module):
    """Catches a pool that knows the tree, a compressor that knows the pool, and the like."""
    rank = RANK[room_of(module)]
    for imported in IMPORTS[module]:
        room = room_of(imported)
        if room in RANK:
            assert RANK[room] <= rank, f"{module} imports {imported}"
        elif room and rank < RANK["rounds"]:
            assert room in GROUND, f"{module} imports {imported}"


@pytest.mark.parametrize("name", sorted(GROUND))
def test_the_ground_imports_nothing_of_ours(name):
    """Catches a detour upwards through a file that everyone may import."""
    assert not {i for i in IMPORTS[f"sglang_vericache.{name}"] if room_of(i) is not None}


def test_only_the_algorithm_knows_the_worker():
    """Catches an import of the worker at start-up: every process that loads plugins would pay
    for it, and the arrows would close to a ring."""
    users = {name for name, imports in IMPORTS.items() if "sglang_vericache.worker" in imports}
    assert users == {"sglang_vericache.algorithm"}
    tree = ast.parse(SOURCES["sglang_vericache.algorithm"].read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    for item in functions:
        item.body = [ast.Pass()]
    assert "sglang_vericache.worker" not in imports_in(tree, "algorithm.py")


def python_files() -> list[Path]:
    folders = (PACKAGE, KERNELS, TESTS, BENCHMARKS)
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def test_files_stay_short():
    """Catches the file that everything is added to."""
    lines = {path: len(path.read_text().splitlines()) for path in python_files()}
    assert not {str(path): count for path, count in lines.items() if count > LONGEST_FILE}


def test_no_grab_bags():
    """Catches a name that says nothing about what belongs inside."""
    names = {"utils", "util", "helpers", "misc", "common"}
    assert not [str(path) for path in python_files() if names & {path.stem, path.parent.name}]


@pytest.mark.parametrize(
    "path",
    [p for room in ("unit", "kernels") for p in sorted((TESTS / room).glob("*.py"))],
    ids=lambda path: path.name,
)
def test_fast_tests_need_no_sglang(path):
    """Catches a unit test that only runs where SGLang's CUDA libraries load."""
    assert "sglang" not in top(imports_in(ast.parse(path.read_text()), path.name))


def test_folders():
    """Catches a folder that is left out of the wheel, and one that is named but not there: an
    installation from a fresh clone stops at it."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    present = {module_of(path.parent / "__init__.py") for path in SOURCES.values()}
    assert set(declared["packages"]) == present
    assert len(declared["packages"]) == len(present), "a package is named twice"
    for package, folder in declared["package-dir"].items():
        assert package in present and (ROOT / folder).is_dir()
