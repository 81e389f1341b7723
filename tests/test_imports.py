"""What importing costs and gives: no torch before it is needed, every public name, and the paths that files once had.

Run: python -m pytest tests/test_imports.py
"""

import ast
import subprocess
import sys
from importlib import import_module
from importlib.machinery import PathFinder

import pytest

import sae
from tests.conftest import ROOT


def loaded(code):
    """Whether torch and numpy are there after this code, in a process of its own."""
    code += "\nprint('loaded', *(name for name in ('torch', 'numpy') if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", f"import sys\n{code}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize("name", ["sae", "sae.flags", "sae.config", "sae.log", "sae.edits"])
def test_no_torch_before_it_is_needed(name):
    assert loaded(f"import {name}") == []


@pytest.mark.parametrize("name", ["chat", "sae_collect", "sae_eval", "sae_train", "sae_upload", "sae_viz"])
def test_flags_are_read_before_torch_loads(name):
    for flags, code in (["--help"], 0), (["--no_such_flag"], 2):
        run = f"log.run_script(import_module('scripts.{name}').main, {flags})"
        code = f"except SystemExit as e:\n    assert e.code == {code}"
        assert loaded(f"from importlib import import_module\nfrom sae import log\ntry:\n    {run}\n{code}") == []


def test_public_names_are_there_and_known_to_editors():
    tree = ast.walk(ast.parse((ROOT / "sae" / "__init__.py").read_text()))
    (typed,) = (n for n in tree if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    imports = {a.asname: n.module for n in typed.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert imports == {name: f"sae.{place}" for name, place in sae._PUBLIC.items()}
    names: dict = {}
    exec("from sae import *", names)
    assert set(sae.__all__) <= names.keys() and set(sae.__all__) <= set(dir(sae))
    assert all(getattr(sae, name) is names[name] for name in sae.__all__)
    assert sae.hooks.resolve and sae.datasets.open_dataset  # modules too, under the names they had as well
    with pytest.raises(AttributeError, match="nonsense"):
        sae.nonsense  # noqa: B018
    with pytest.raises(ImportError, match="nonsense"):
        from sae import nonsense  # noqa: F401


@pytest.mark.parametrize(("old", "new"), sae._MOVED.items())
def test_old_paths_give_the_same_module(old, new):
    module = import_module(f"sae.{old}")
    assert module is import_module(f"sae.{new}") is getattr(sae, old)
    assert module.__spec__.name == module.__name__ == f"sae.{new}"


@pytest.mark.parametrize("name", [n for n in sae._MOVED if not PathFinder.find_spec(n)])
def test_old_paths_are_those_of_sae_alone(name):
    """`import nanochat` where it is not installed is an error, not sae's own file of that name."""
    with pytest.raises(ModuleNotFoundError):
        import_module(name)


def test_old_paths_as_people_wrote_them():
    """In a process of its own: here the modules are imported already."""
    code = """
import sae.datasets as ours
from sae import formats, tokens
from sae.formats import load_cfg, load_sae, save_sae, write_json
from sae.language_model import load_language_model
import sae.data.datasets
assert ours is sae.data.datasets and tokens is sae.data.tokens and sae.buffer is sae.data.buffer
assert load_language_model is sae.load_language_model and load_sae is sae.load_sae is formats.load_sae
"""
    assert "torch" in loaded(code)
    with pytest.raises(ImportError, match="nonsense"):
        from sae.formats import nonsense  # noqa: F401
