"""What each character of a Python text is, by Python's own tokenizer: for labels that are exact where text is code.

The text may be a piece of a file: it may begin inside a string or end in the middle of a line.
"""

from __future__ import annotations

import io
import keyword
import tokenize
from collections.abc import Iterator

import numpy as np

KINDS = (
    "|a comment|a docstring|a string|a number|a keyword|a plain name|a function's name in its def|a class's name|"
    "a parameter|a decorator|an attribute|a called function|a called method|a keyword argument|an imported name|"
    "an opening bracket|a closing bracket|a comma|a colon|an assignment|a comparison|a dot|an operator|"
    "a line's end or indentation"
).split("|")
TOP = "outside of brackets"
PLACES = (
    "|in a call's arguments|in a parameter list|in a list|in a dict or set|in a subscript|in parentheses|" + TOP
).split("|")
STATEMENTS = (
    "|def|class|return|if|elif|else|for|while|with|try|except|finally|import|from|raise|assert|del|pass|break|continue|"
    "yield|global|nonlocal|lambda|async|await|not|@|an assignment|a call|an expression"
).split("|")
KIND, PLACE, STATEMENT = ({name: i for i, name in enumerate(names)} for names in (KINDS, PLACES, STATEMENTS))
COMPARE = ("==", "!=", "<", ">", "<=", ">=")
SIGNS = {",": "a comma", ":": "a colon", ".": "a dot", **dict.fromkeys(COMPARE, "a comparison")}
SIGNS |= dict.fromkeys("([{", "an opening bracket") | dict.fromkeys(")]}", "a closing bracket")
# Python 3.12 cuts f-strings into parts
STRINGS = {getattr(tokenize, n, tokenize.STRING) for n in ("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END", "STRING")}
TYPES = {tokenize.COMMENT: "a comment", tokenize.NUMBER: "a number", **dict.fromkeys(STRINGS, "a string")}
BLANK = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def annotate(text: str) -> np.ndarray | None:
    """(3, len(text)) uint8: for each character its index in KINDS, PLACES and STATEMENTS, 0 where unknown; None for a
    text that is not Python."""
    best, least = None, 0.3
    for opening in ("", '"""', "'''"):  # a piece may begin inside a string
        found = _annotate(opening + text, len(opening))
        if found is not None and found[1] < least:
            best, least = found
        if opening == "" and least < 0.02:
            break
    return best


def _annotate(text: str, skip: int) -> tuple[np.ndarray, float] | None:
    """The array without the first `skip` characters, and the share of names that follow each other as in prose."""
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
    blank = np.array([c.isspace() for c in text]) & (what[0] == 0)
    what[0][blank] = KIND["a line's end or indentation"]
    return what[:, skip:], prose / names


def _statements(lines: list[str]) -> Iterator[list[tokenize.TokenInfo]]:
    """The tokens of each statement without blank ones. Lines that cannot be read are skipped one at a time."""
    first = 0
    while first < len(lines):
        # open the blocks that the piece was cut out of, so that a dedent is no error
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
    """The string that the text ends in, if that is the error."""
    message, where = (error.args + ("", None))[:2]
    if "multi-line string" not in str(message) and "triple-quoted" not in str(message):
        return None
    row, column = where[0] + shift, where[1]
    if not 0 < row <= len(lines):
        return None
    return tokenize.TokenInfo(tokenize.STRING, "", (row, column), (len(lines), len(lines[-1])), "")


def _roles(statement: list[tokenize.TokenInfo]) -> tuple[list[str], str, list[str]]:
    """The kind and the place of each token, and what the statement is."""
    texts = [t.string for t in statement] + ["", ""]  # the last is also what stands before the first token
    head = texts[1] if texts[0] == "async" and len(statement) > 1 else texts[0]
    kinds: list[str] = []
    places: list[str] = []
    stack: list[str] = []  # a place for each open bracket
    for i, token in enumerate(statement):
        before, text, after = texts[i - 1], texts[i], texts[i + 1]
        if text in (")", "]", "}") and stack:
            stack.pop()
        places.append(stack[-1] if stack else TOP)
        if token.type == tokenize.NAME:
            kinds.append(_name(text, before, after, head, places[-1]))
        elif token.type == tokenize.STRING and len(statement) == 1:
            kinds.append("a docstring")
        elif text == "@" and i == 0:
            kinds.append("a decorator")
        else:
            other = "an assignment" if text[-1:] == "=" else "an operator"
            kinds.append(TYPES.get(token.type) or SIGNS.get(text, other))
        if text in ("(", "[", "{"):
            stack.append(_bracket(text, kinds[i - 1] if i else "", before))
    if kinds[0] in ("a comment", "a docstring"):
        head = ""
    elif head not in STATEMENT:
        equals = any(t == "=" and p == TOP for t, p in zip(texts, places, strict=False))
        if equals or any(t[-1:] == "=" and t not in COMPARE for t in texts):
            head = "an assignment"
        else:
            head = "a call" if {"a called function", "a called method"} & set(kinds) else "an expression"
    return kinds, head, places


def _name(text: str, before: str, after: str, head: str, place: str) -> str:
    """The kind of a name: that of the first rule that holds."""
    rules = (
        ("a keyword", keyword.iskeyword(text)),
        ("a function's name in its def", before == "def"),
        ("a class's name", before == "class"),
        ("a decorator", head == "@" and place == TOP),
        ("an imported name", head in ("import", "from")),
        ("a called method", before == "." and after == "("),
        ("an attribute", before == "."),
        ("a called function", after == "("),
        ("a parameter", place == "in a parameter list" and before in ("(", ",", "*", "**")),
        ("a keyword argument", after == "=" and place == "in a call's arguments"),
    )
    return next((kind for kind, holds in rules if holds), "a plain name")


def _bracket(text: str, kind: str, before: str) -> str:
    """The place that an opening bracket begins; kind, before: those of the token before it."""
    if text == "{":
        return "in a dict or set"
    if text == "[":
        named = before in (")", "]") or (before.isidentifier() and not keyword.iskeyword(before))
        return "in a subscript" if named else "in a list"
    if kind == "a function's name in its def":
        return "in a parameter list"
    called = kind.startswith(("a called", "a class's", "a decorator"))
    return "in a call's arguments" if called else "in parentheses"
