"""The floor plan holds: a file of sae/ imports only from strictly lower floors, and files and functions stay small.

Run: python -m pytest tests/test_floors.py
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "flags": 0, "native": 0, "stopwatch": 0, "triton_kernels": 0,
    "config": 1, "triton_encoder": 1,
    "commands": 2, "kernels": 2, "log": 2, "nanochat": 2, "schedules": 2, "distributed": 2,
    "edits": 2,
    "hooks": 3, "selection": 3, "tokenizers": 3,
    "base": 4,
    "models": 5, "optim": 5,
    "language_model": 6, "formats": 6,
    "datasets": 7, "records": 7, "syntax": 0, "directions": 0, "dashboard": 8, "explainer": 8, "neuronpedia_format": 8,
    "tokens": 8, "neuronpedia": 9,
    "buffer": 3, "activations": 9,
    "plan": 7, "checkpoint": 7, "cache": 10, "evaluator": 10, "runtime": 10,
    "activation_files": 11, "learner": 11, "feature_tables": 11, "assessment": 11, "plots": 11,
    "labels": 12, "feature_viz": 13,
    "conversation": 11, "server": 12,
    "trainer": 12, "end_to_end": 12, "sweep": 12,
}  # fmt: skip
FILES = sorted(p for p in (ROOT / "sae").glob("*.py") if p.stem != "__init__")


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "sae":
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sae."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("sae.")}
            found |= {a.name for a in node.names if a.name in ("model", "tokenizer", "train", "scripts")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_imports_go_down(path):
    assert path.stem in FLOORS, f"{path.name} has no floor; add it to the plan"
    for name in imports(ast.parse(path.read_text())):
        assert name in FLOORS, f"{path.name} imports {name}, which is not part of sae/"
        assert FLOORS[name] < FLOORS[path.stem], f"{path.name} imports {name}, which is not below it"


def test_the_small_gpt_knows_nothing_of_sae():
    for name in ("model.py", "train.py", "sample.py", "tokenizer.py"):
        tree = ast.parse((ROOT / name).read_text())
        roots = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        roots |= {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        assert "sae" not in roots, name


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_files_and_functions_stay_small(path):
    source = path.read_text()
    assert len(source.splitlines()) <= 520, f"{path.name} is long; look for the simpler idea"
    assert ast.get_docstring(ast.parse(source)), f"{path.name} does not say what it does"
    assert source.isascii()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno
            assert length <= 80, f"{path.name}:{node.name} has {length} lines"


def test_config_needs_no_torch():
    tree = ast.parse((ROOT / "sae" / "config.py").read_text())
    assert "torch" not in ast.dump(tree).replace("torch.", "").split("'")


def test_only_log_prints():
    for path in FILES:
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        prints = [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
        assert not prints or path.stem == "log", f"{path.name} prints at {prints}"
