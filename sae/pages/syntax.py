"""What each character of a Python text is, by Python's own tokenizer: for labels that are exact where text is code.

Text need not be whole: a piece of a file may begin inside a string or end in the middle of a line.
"""

from __future__ import annotations

import io
import keyword
import tokenize
from collections.abc import Iterator

import numpy as np

KINDS = (
    "", "a comment", "a docstring", "a string", "a number", "a keyword", "a plain name", "a function's name in its def",
    "a class's name", "a parameter", "a decorator", "an attribute", "a called function", "a called method",
    "a keyword argument", "an imported name", "an opening bracket", "a closing bracket", "a comma", "a colon",
    "an assignment", "a comparison", "a dot", "an operator", "a line's end or indentation",
)  # fmt: skip
TOP = "outside of brackets"
PLACES = (
    "", "in a call's arguments", "in a parameter list", "in a list", "in a dict or set", "in a subscript",
    "in parentheses", TOP,
)  # fmt: skip
STATEMENTS = (
    "", "def", "class", "return", "if", "elif", "else", "for", "while", "with", "try", "except", "finally", "import",
    "from", "raise", "assert", "del", "pass", "break", "continue", "yield", "global", "nonlocal", "lambda", "async",
    "await", "not", "@", "an assignment", "a call", "an expression",
)  # fmt: skip
KIND, PLACE, STATEMENT = ({name: i for i, name in enumerate(names)} for names in (KINDS, PLACES, STATEMENTS))
OPEN, CLOSE = "([{", ")]}"
COMPARE = ("==", "!=", "<", ">", "<=", ">=")
BLANK = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
# Python 3.12 cuts f-strings into parts
PARTS = tuple(
    getattr(tokenize, name) for name in ("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END") if hasattr(tokenize, name)
)
STRINGS = (tokenize.STRING, *PARTS)


def annotate(text: str) -> np.ndarray | None:
    """(3, len(text)) uint8: for each character an index into KINDS, PLACES, STATEMENTS, 0 where nothing is known; None
    for a text that is not Python."""
    best, least = None, 0.3
    for opening in ("", '"""', "'''"):  # a piece may begin inside a string
        found = _annotate(opening + text, len(opening))
        if found is not None and found[1] < least:
            best, least = found[0], found[1]
        if opening == "" and least < 0.02:
            break
    return best


def _annotate(text: str, skip: int) -> tuple[np.ndarray, float] | None:
    """The arrays without the first `skip` characters, and the share of names that stand as in prose."""
    lines = text.splitlines(keepends=True)
    starts = np.cumsum([0] + [len(line) for line in lines]).tolist()
    what = np.zeros((3, len(text)), dtype=np.uint8)
    names = prose = keywords = 0
    for statement in _statements(lines):
        codes, head, places = _roles(statement)
        for token, kind, place in zip(statement, codes, places, strict=True):
            begin, end = (starts[min(r, len(lines)) - 1] + c for r, c in (token.start, token.end))
            what[:, begin:end] = [[KIND[kind]], [PLACE[place]], [STATEMENT[head]]]
        plain = [t.type == tokenize.NAME and not keyword.iskeyword(t.string) for t in statement]
        names += sum(plain)
        prose += sum(a and b for a, b in zip(plain, plain[1:], strict=False))
        keywords += sum(t.string in ("def", "class", "import", "return", "self", "=") for t in statement)
    if not keywords or not names:
        return None
    what[0][what[0] == 0] = (
        KIND["a line's end or indentation"] * np.array([c.isspace() for c in text], dtype=np.uint8)[what[0] == 0]
    )
    return what[:, skip:], prose / names


def _statements(lines: list[str]) -> Iterator[list[tokenize.TokenInfo]]:
    """The tokens of each statement, blank ones left out; what cannot be read is skipped, a line at a time."""
    first = 0
    while first < len(lines):
        # the levels of indentation that the piece was cut out of, so that leaving them is no error
        width = len(lines[first]) - len(lines[first].lstrip(" "))
        levels = [f"{' ' * n}if 1:\n" for n in range(0, width, 4)]
        shift = first - len(levels)
        source = io.StringIO("".join([*levels, *lines[first:]]))
        statement: list[tokenize.TokenInfo] = []
        last = first
        try:
            for token in tokenize.generate_tokens(source.readline):
                begin, end = ((r + shift, c) for r, c in (token.start, token.end))
                if begin[0] <= first:
                    continue
                last = max(last, end[0])
                if token.type not in BLANK:
                    statement.append(token._replace(start=begin, end=end))
                alone = token.type == tokenize.COMMENT and len(statement) == 1
                if statement and (alone or token.type in (tokenize.NEWLINE, tokenize.ENDMARKER)):
                    yield statement
                    statement = []
            return
        except (tokenize.TokenError, SyntaxError) as e:
            if statement:
                yield statement
                last = max(last, statement[-1].end[0])
            rest = _unfinished(lines, e, shift)
            if rest is not None:
                yield [rest]
                return
            first = max(first + 1, last)


def _unfinished(lines: list[str], error: Exception, shift: int) -> tokenize.TokenInfo | None:
    """The string that the text ends in, where that is what is wrong."""
    message, where = (error.args + ("", None))[:2]
    if "multi-line string" not in str(message) and "triple-quoted" not in str(message):
        return None
    row, column = where[0] + shift, where[1]
    if not 0 < row <= len(lines):
        return None
    return tokenize.TokenInfo(tokenize.STRING, "", (row, column), (len(lines), len(lines[-1])), "")


def _roles(statement: list[tokenize.TokenInfo]) -> tuple[list[str], str, list[str]]:
    """Of each token its kind and its place; and what the statement is."""
    head = statement[0].string
    if head == "async" and len(statement) > 1:
        head = statement[1].string
    texts = [t.string for t in statement] + ["", ""]
    kinds: list[str] = []
    places: list[str] = []
    stack: list[str] = []  # the brackets that are open
    for i, token in enumerate(statement):
        text, before, after = token.string, texts[i - 1] if i else "", texts[i + 1]
        if text in CLOSE and stack and text:
            stack.pop()
        place = stack[-1] if stack else TOP
        kinds.append(_kind(token, text, before, after, head, place, i, len(statement)))
        places.append(place)
        if text in OPEN and text:
            stack.append(_bracket(text, kinds[i - 1] if i else "", before))
    if head not in STATEMENT:
        equals = any(t == "=" and p == TOP for t, p in zip(texts, places, strict=False))
        head = (
            "an assignment"
            if equals or any(t[-1:] == "=" and t not in COMPARE for t in texts)
            else ("a call" if "a called function" in kinds or "a called method" in kinds else "an expression")
        )
    if kinds[0] in ("a comment", "a docstring"):
        head = ""
    return kinds, head, places


def _bracket(text: str, kind: str, before: str) -> str:
    if text == "(":
        if kind == "a function's name in its def":
            return "in a parameter list"
        return (
            "in a call's arguments" if kind.startswith(("a called", "a class's", "a decorator")) else "in parentheses"
        )
    if text == "{":
        return "in a dict or set"
    named = before and (before.isidentifier() and not keyword.iskeyword(before) or before in ")]")
    return "in a subscript" if named else "in a list"


def _kind(token: tokenize.TokenInfo, text: str, before: str, after: str, head: str, place: str, i: int, n: int) -> str:
    if token.type == tokenize.COMMENT:
        return "a comment"
    if token.type in STRINGS:
        return "a docstring" if n == 1 and token.type == tokenize.STRING else "a string"
    if token.type == tokenize.NUMBER:
        return "a number"
    if token.type == tokenize.NAME:
        return _name(text, before, after, head, place)
    if text and text in OPEN:
        return "an opening bracket"
    if text and text in CLOSE:
        return "a closing bracket"
    if text in COMPARE:
        return "a comparison"
    if text == "@" and i == 0:
        return "a decorator"
    return {",": "a comma", ":": "a colon", ".": "a dot"}.get(text) or (
        "an assignment" if text[-1:] == "=" else "an operator"
    )


def _name(text: str, before: str, after: str, head: str, place: str) -> str:
    if keyword.iskeyword(text):
        return "a keyword"
    if before == "def":
        return "a function's name in its def"
    if before == "class":
        return "a class's name"
    if head == "@" and place == TOP:
        return "a decorator"
    if head in ("import", "from"):
        return "an imported name"
    if before == ".":
        return "a called method" if after == "(" else "an attribute"
    if after == "(":
        return "a called function"
    if place == "in a parameter list" and before in ("(", ",", "*", "**"):
        return "a parameter"
    if after == "=" and place == "in a call's arguments":
        return "a keyword argument"
    return "a plain name"
