"""The floor plan holds: imports run in one direction, rooms keep their borders, and functions stay small.

A room is a file of sae/ or a folder of it. Reach is what an import brings in, directly or through others.
Run: python -m pytest tests/test_reach.py
"""

import ast
import os
import shutil
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter

import pytest

from tests.conftest import ROOT

FILES = {
    ".".join(p.relative_to(ROOT / "sae").with_suffix("").parts): p
    for p in sorted((ROOT / "sae").rglob("*.py"))
    if p.name != "__init__.py"
}
ROOMS = sorted({name.split(".")[0] for name in FILES})
# What a file's docstring says it does not know, so its imports must not reach it either.
NEVER = {
    "flags": ROOMS,
    "kernels": [room for room in ROOMS if room != "kernels"],
    "config": ["kernels", "hooks", "distributed", "files"],
    "schedules": ["kernels", "models", "learner"],
    "hooks": ["kernels", "models", "lm", "data"],
    "metrics": ["models", "lm", "data", "files"],
    "models": ["lm", "data", "files", "formats", "learner"],
    "optim": ["lm", "data", "files", "learner"],
    "learner": ["lm", "data", "files", "formats", "pages"],
    "trainer": ["pages", "chat", "runtime"],
    "files": ["models", "kernels", "lm"],
    "lm": ["models", "kernels", "data"],
    "data": ["models", "base", "learner", "formats"],
    "pages.records": ["models", "kernels", "lm", "data", "distributed"],
    "pages.dashboard": ["models", "kernels", "lm", "data", "distributed"],
    "pages.syntax": ROOMS,
    "chat": ["learner", "trainer", "evaluator"],
    "runtime": ["data", "learner", "trainer", "evaluator", "pages"],
}


@cache
def imports(name: str) -> frozenset[str]:
    """The files of sae/ that one of them imports, those inside functions included."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{name} has a relative import, which hides here"
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "sae":
            whole = node.module.split(".")[1:]
            for alias in node.names:
                inner = ".".join([*whole, alias.name])
                found.add(inner if inner in FILES else ".".join(whole))
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.startswith("sae.")}
            found |= {a.name for a in node.names if a.name in ("model", "tokenizer", "train", "scripts")}
    assert found <= FILES.keys(), f"{name} imports {found - FILES.keys()}, which is no file of sae/"
    return frozenset(found)


@cache
def reach(name: str) -> frozenset[str]:
    """All that comes in with a file, itself included."""
    return frozenset({name}).union(*(reach(other) for other in imports(name)))


def rooms_of(names: frozenset[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def room_graph() -> dict[str, set[str]]:
    graph: dict[str, set[str]] = {room: set() for room in ROOMS}
    for name in FILES:
        graph[name.split(".")[0]] |= rooms_of(imports(name)) - {name.split(".")[0]}
    return graph


def test_no_circle_between_files_or_rooms():
    tuple(TopologicalSorter({name: imports(name) for name in FILES}).static_order())
    tuple(TopologicalSorter(room_graph()).static_order())


def test_the_longest_chain_of_rooms_is_short():
    graph = room_graph()

    @cache
    def chain(room: str) -> tuple[str, ...]:
        return (room, *max((chain(other) for other in graph[room]), key=len, default=()))

    longest = max(map(chain, graph), key=len)
    assert len(longest) <= 9, " -> ".join(longest)


@pytest.mark.parametrize("place", NEVER)
def test_a_file_reaches_nothing_that_it_claims_not_to_know(place):
    for name in (n for n in FILES if n == place or n.startswith(f"{place}.")):
        known = reach(name) - {name}
        assert not rooms_of(known) & set(NEVER[place]), f"{name} reaches {sorted(known)}"


def test_the_kernels_pass_their_own_tests_without_the_rest(tmp_path):
    """sae/kernels/ and its tests, alone in a folder. Of Triton's, whose interpreter is slow, only the quick ones."""
    shutil.copytree(ROOT / "sae" / "kernels", tmp_path / "sae" / "kernels")
    (tmp_path / "sae" / "__init__.py").touch()
    (tmp_path / "tests").mkdir()
    for name in ("sparse", "native", "triton"):
        shutil.copy(ROOT / "tests" / "kernels" / f"test_{name}.py", tmp_path / "tests")
    few = "test_sparse or (test_native and plain) or twin or moments or rows or ties"
    asked = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", "-k", few]
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    run = subprocess.run(asked, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    files = (
        "import sae.kernels, sae.kernels.adam, sae.kernels.selection, sae.kernels.triton_encoder; print(sae.__file__)"
    )
    run = subprocess.run([sys.executable, "-c", files], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.stdout.strip() == str(tmp_path / "sae" / "__init__.py"), run.stderr[-3000:]


def test_the_listing_of_sae_stays_short():
    listed = [p for p in (ROOT / "sae").iterdir() if p.name != "__pycache__"]
    assert len([p for p in listed if p.is_file()]) <= 27
    assert len([p for p in listed if p.is_dir()]) <= 7


OTHER_TESTS = set(
    "benchmarks imports kernels_in_training ninth_kind reach readme scripts train_gpt triton_in_training".split()
)


def test_tests_mirror_the_tree():
    """A file of the core has tests/test_<file>.py, a room tests/<room>/, and no test file is about one that is gone."""
    tests = {p.stem.removeprefix("test_") for p in (ROOT / "tests").glob("test_*.py")}
    core = {name for name in FILES if "." not in name}
    assert core - tests == set(), "these files have no tests of their own"
    assert tests - core == OTHER_TESTS, "these tests are about no file of sae/"
    for room in set(ROOMS) - core:
        inside = [name.split(".")[1] for name in FILES if name.startswith(f"{room}.")]
        found = [p.stem.removeprefix("test_") for p in (ROOT / "tests" / room).glob("test_*.py")]
        assert found, f"{room}/ has no tests"
        assert [t for t in found if not any(name.startswith(t) for name in inside)] == []


def test_every_room_says_what_it_is():
    for folder in (p for p in (ROOT / "sae").iterdir() if p.is_dir() and p.name != "__pycache__"):
        tree = ast.parse((folder / "__init__.py").read_text())
        assert ast.get_docstring(tree) and len(tree.body) == 1, f"{folder.name}/__init__.py is one docstring"


@pytest.mark.parametrize("name", FILES)
def test_every_file_says_what_it_does(name):
    source = FILES[name].read_text()
    assert ast.get_docstring(ast.parse(source)), f"{name} does not say what it does"
    assert source.isascii()


def test_functions_stay_small_and_the_formatter_is_obeyed():
    """Both in all of the project: a function has at most 60 lines, and 30 places keep a layout of their own."""
    places = [p for top in ("sae", "scripts", "tests", "benchmarks") for p in (ROOT / top).rglob("*.py")]
    own_layout = 0
    for path in [*places, *ROOT.glob("*.py")]:
        source = path.read_text()
        own_layout += source.count("# fmt: " + "skip")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                assert length <= 60, f"{path.relative_to(ROOT)}:{node.name} has {length} lines"
    assert len(places) > 100 and own_layout <= 30


def test_the_small_gpt_knows_nothing_of_sae():
    for name in ("model.py", "train.py", "sample.py", "tokenizer.py"):
        tree = ast.parse((ROOT / name).read_text())
        roots = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        roots |= {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert "sae" not in roots, name


def test_only_log_prints():
    for name, path in FILES.items():
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        prints = [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
        assert not prints or name == "log", f"{name} prints at {prints}"


def test_scripts_import_no_script():
    for path in (ROOT / "scripts").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [f"{node.module}"] if isinstance(node, ast.ImportFrom) else []
            assert not [n for n in names if n.split(".")[0] == "scripts"], path.name


def test_a_wheel_holds_every_file_of_sae():
    """What pyproject.toml lists: a room or a page that it forgets is missing only where the wheel is installed."""
    tomllib = pytest.importorskip("tomllib")
    said = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packed = [p for package in said["packages"] for p in (ROOT / package.replace(".", "/")).glob("*.py")]
    for package, patterns in said["package-data"].items():
        packed += [p for pattern in patterns for p in (ROOT / package.replace(".", "/")).glob(pattern)]
    there = {p for p in (ROOT / "sae").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert there - set(packed) == set()
    assert len([p for p in packed if p.suffix in (".cpp", ".html", ".css", ".js")]) == 7
