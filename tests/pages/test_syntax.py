"""Characters of Python text get the kind, place and statement that they have in its grammar, also in pieces of files;
prose gets none.

Run: python -m pytest tests/pages/test_syntax.py
"""

import ast

import numpy as np
import pytest

from sae.pages.syntax import KINDS, PLACES, STATEMENTS, annotate
from tests.conftest import ROOT

SOURCE = '''import os.path as p

class Thing(Base):
    """What it is."""

    @staticmethod
    def make(self, size=3, *args):
        # a comment
        x = call(size, key=args[0]) == {1: "text"}
        return x.method(x) if x else [p.name]
'''


def roles(text, word, n=0):
    """(kind, place, statement) of the n-th occurrence of a word, the same for all its characters."""
    at = -1
    for _ in range(n + 1):
        at = text.index(word, at + 1)
    found = annotate(text)
    assert found is not None
    part = found[:, at : at + len(word)]
    assert (part == part[:, :1]).all(), word
    return KINDS[part[0, 0]], PLACES[part[1, 0]], STATEMENTS[part[2, 0]]


TOP = "outside of brackets"


@pytest.mark.parametrize(
    ("word", "n", "wanted"),
    [
        ("path", 0, ("an imported name", TOP, "import")),
        ("Thing", 0, ("a class's name", TOP, "class")),
        ("Base", 0, ("a plain name", "in a call's arguments", "class")),
        ('"""What it is."""', 0, ("a docstring", TOP, "")),
        ("staticmethod", 0, ("a decorator", TOP, "@")),
        ("def", 0, ("a keyword", TOP, "def")),
        ("make", 0, ("a function's name in its def", TOP, "def")),
        ("self", 0, ("a parameter", "in a parameter list", "def")),
        ("args", 0, ("a parameter", "in a parameter list", "def")),
        ("# a comment", 0, ("a comment", TOP, "")),
        ("call", 0, ("a called function", TOP, "an assignment")),
        ("key", 0, ("a keyword argument", "in a call's arguments", "an assignment")),
        ("0", 0, ("a number", "in a subscript", "an assignment")),
        ("==", 0, ("a comparison", TOP, "an assignment")),
        ('"text"', 0, ("a string", "in a dict or set", "an assignment")),
        ("method", 1, ("a called method", TOP, "return")),
        ("name", 0, ("an attribute", "in a list", "return")),
    ],
)
def test_each_word_is_what_it_is(word, n, wanted):
    assert roles(SOURCE, word, n) == wanted


def test_names_of_functions_are_those_that_ast_finds():
    text = (ROOT / "sae" / "pages" / "labels.py").read_text()
    found, lines = annotate(text), np.cumsum([0] + [len(line) for line in text.splitlines(keepends=True)])
    assert found is not None
    code = KINDS.index("a function's name in its def")
    wanted = sum(len(n.name) for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef))
    assert int((found[0] == code).sum()) == wanted
    for n in ast.walk(ast.parse(text)):
        if isinstance(n, ast.FunctionDef):
            at = int(lines[n.lineno - 1]) + n.col_offset + len("def ")
            assert (found[0, at : at + len(n.name)] == code).all()


def test_pieces_of_files():
    inside = "and so ends what isn't code.\n    " + '"""\n    return self.value + 1\n'
    assert roles(inside, "ends")[0] == "a docstring"
    assert roles(inside, "return")[0] == "a keyword"
    assert roles(inside, "value") == ("an attribute", TOP, "return")
    open_end = 'x = f(1)\nif x:\n    """begun and never\nended, it\'s so'
    assert roles(open_end, "never")[0] == "a docstring"
    assert roles(open_end, "f")[0] == "a called function"
    indented = "        y = self.g(a)\n    return y\nclass A:\n    pass\n"
    assert roles(indented, "g") == ("a called method", TOP, "an assignment")
    assert roles(indented, "return")[0] == "a keyword"
    assert roles(indented, "A")[0] == "a class's name"
    broken = "a = $ ? !\nb = f(2)\nimport os\n"
    assert roles(broken, "os")[0] == "an imported name"


@pytest.mark.parametrize(
    "text", ["", "\n", "It was the best of times, it was the worst of times.", "(((((", "\x00\udc80", "1 2 3"]
)
def test_prose_and_noise_are_not_python(text):
    found = annotate(text)
    assert found is None or not found[2].any()
