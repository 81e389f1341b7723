"""The corpus that is on every user's disk: Python's own standard library, as source files and as dialogues.

    python assets/pygpt/corpus.py --out_dir data/pygpt --vocab_size 4096

trains a tokenizer and writes tokenizer.json, train.bin and val.bin (uint16, nanoGPT's layout). The dialogues
are made from docstrings and signatures by parsing; no module of the corpus is imported. Another version of
Python has another library, and hence another corpus.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import os
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Chat = list[dict[str, str]]
Node = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

TEST_DIRS = {"test", "tests", "idle_test"}
SKIPPED_DIRS = {"site-packages", "dist-packages", "__pycache__"}
MAX_FILE_BYTES = 1_000_000
# Where the code of a public module lives in a file under another name.
PUBLIC_NAMES = {
    "posixpath": "os.path",
    "_collections_abc": "collections.abc",
    "_pydecimal": "decimal",
    "_pydatetime": "datetime",
    "_pyio": "io",
    "_strptime": "time",
    "_weakrefset": "weakref",
}
DESCRIBE = (
    "What does {name} do?",
    "What does `{name}` do?",
    "What is {name}?",
    "What is `{name}` for?",
    "Explain {name}.",
    "Can you tell me what {name} does?",
    "Describe `{name}` in one sentence.",
    "Tell me about {name}.",
)
PARAMETERS = (
    "What are the parameters of {name}?",
    "What are the parameters of `{name}`?",
    "Which arguments does {name} take?",
    "How do I call {name}?",
    "Show me the signature of `{name}`.",
)
WHICH = (
    "Which {kind} of `{module}` does this: {answer}",
    "Which {kind} of {module} is described as: {answer}",
    "Name the {kind} of {module} with this docstring: {answer}",
)
KIND = (
    "Is {name} a class or a function?",
    "What kind of thing is `{name}`?",
    "Is `{name}` a function or a class?",
)


@dataclass(frozen=True)
class Documented:
    """Something with a docstring: its kind is module, class, function or method."""

    name: str
    parent: str
    kind: str
    summary: str
    parameters: str


def documents(split: str, *, tests: bool = False) -> Iterator[str | Chat]:
    """Yield the documents of "train", "val" or "all" in an order that is shuffled the same way every time.

    A document is the text of a file, or a chat about something in it; both are in the split of their file,
    which its path decides. tests=True adds the test suite's files (as texts only).
    """
    if split not in ("train", "val", "all"):
        raise ValueError(f"split={split!r} is unknown; choose 'train', 'val' or 'all'")
    keyed: list[tuple[int, str | Chat]] = []
    for file, path in library_files(tests):
        if split != "all" and split != ("val" if _hash(path) % 20 == 0 else "train"):
            continue
        text = _read(file)
        if text is None:
            continue
        own: list[str | Chat] = [text]
        if not TEST_DIRS & set(path.split("/")):
            own += dialogues(text, module_name(path))
        keyed += [(_hash(f"{path} {i}"), doc) for i, doc in enumerate(own)]
    # Order by hash: a prefix of any length is a fair sample of files and dialogues.
    keyed.sort(key=lambda pair: pair[0])
    yield from (doc for _, doc in keyed)


def library_files(tests: bool = False) -> list[tuple[Path, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, names, files in os.walk(root):  # prunes, where rglob would walk through all of site-packages
        names[:] = [n for n in names if n not in SKIPPED_DIRS and (tests or n not in TEST_DIRS)]
        for name in files:
            path = (Path(folder) / name).relative_to(root).as_posix()
            if name.endswith(".py") and not path.startswith("lib2to3/tests/data/"):
                found.append((root / path, path))
    return sorted(found, key=lambda pair: pair[1])


def _read(file: Path) -> str | None:
    if file.stat().st_size > MAX_FILE_BYTES:
        return None
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    # The 70 character-set tables of encodings/ are a tenth of the library and no language at all.
    return text if text.strip() and "\ndecoding_table" not in text else None


def _hash(text: str) -> int:
    return int(hashlib.md5(text.encode(), usedforsecurity=False).hexdigest(), 16)


def module_name(path: str) -> str:
    """Return the dotted, public name of a file's module: os/path.py and os/path/__init__.py are os.path."""
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return PUBLIC_NAMES.get(name, name)


def dialogues(source: str, module: str) -> list[Chat]:
    """Make questions and answers about everything in a module that has a docstring."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    return [chat for item in _documented(tree, "module", module, "", "") for chat in _chats(item)]


def _documented(node: Node, kind: str, name: str, parent: str, parameters: str) -> Iterator[Documented]:
    summary = first_sentence(ast.get_docstring(node))
    if summary and summary != name:
        yield Documented(name, parent, kind, summary, parameters)
    if kind in ("function", "method"):
        return  # what is inside a function has no name outside it
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _documented(child, "class", f"{name}.{child.name}", name, "")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            child_kind, path = "method" if kind == "class" else "function", f"{name}.{child.name}"
            yield from _documented(child, child_kind, path, name, f"{path}({ast.unparse(child.args)})")


def first_sentence(docstring: str | None) -> str:
    """Return the first sentence of a docstring on one line, or "" where it does not start with one."""
    paragraph = re.split(r"\n\s*\n", (docstring or "").strip())[0]
    sentence = re.split(r"(?<=[.!?])\s", " ".join(paragraph.split()))[0]
    return sentence if 10 <= len(sentence) <= 300 and not sentence.startswith((">>>", "-", "=")) else ""


def _chats(item: Documented) -> Iterator[Chat]:
    seed = _hash(item.name)

    def chat(templates: tuple[str, ...], answer: str) -> Chat:
        template = templates[seed // 6 % len(templates)]
        question = template.format(name=item.name, kind=item.kind, module=item.parent, answer=item.summary)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    yield chat(DESCRIBE[:2], item.summary)  # the plain question for everything, and a second wording
    yield chat(DESCRIBE[2:], item.summary)
    if item.parameters not in ("", f"{item.name}()", f"{item.name}(self)"):
        yield chat(PARAMETERS, f"`{item.parameters}`")
    if item.kind != "module" and seed % 2:
        yield chat(WHICH, f"`{item.name}`")
    if item.kind != "module" and seed % 3 == 0:
        yield chat(KIND, f"`{item.name}` is a {item.kind}.")


def main(argv: list[str] | None = None) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import numpy as np

    from tokenizer import BPETokenizer

    parser = argparse.ArgumentParser(description="Make the pygpt corpus from Python's standard library.")
    parser.add_argument("--out_dir", default="data/pygpt", help="folder for the three files")
    parser.add_argument("--vocab_size", type=int, default=4096, help="tokens, special ones included")
    parser.add_argument("--tests", action="store_true", help="train on the library's test suite too")
    args = parser.parse_args(argv)
    if not 261 <= args.vocab_size <= 2**16:
        parser.error(f"--vocab_size {args.vocab_size} is outside 261 (bytes and specials) to 65536 (uint16)")
    out = Path(args.out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        parser.error(f"cannot make '{out}': {e.strerror}; choose another --out_dir")

    texts = (d if isinstance(d, str) else "\n".join(m["content"] for m in d) for d in documents("train"))
    tokenizer = BPETokenizer.train(texts, args.vocab_size)
    tokenizer.save(out / "tokenizer.json")
    special = np.array(sorted(tokenizer.special_ids))
    sizes = np.array([len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)])
    sizes[special] = 0
    # The test suite is code too, for a run long enough to want more. Validation stays with the library itself.
    for split, tests in (("train", args.tests), ("val", False)):
        docs = list(documents(split, tests=tests))
        n_files = sum(isinstance(doc, str) for doc in docs)
        tokens = np.concatenate([np.array(tokenizer.encode_document(doc), dtype=np.uint16) for doc in docs])
        tmp = out / f"{split}.bin.tmp"
        tokens.tofile(tmp)
        tmp.replace(out / f"{split}.bin")
        n_bytes, n_ordinary = int(sizes[tokens].sum()), int((~np.isin(tokens, special)).sum())
        print(
            f"{split}: {n_files} files, {len(docs) - n_files} dialogues, {len(tokens):,} tokens, "
            f"{n_bytes:,} bytes, {n_bytes / n_ordinary:.3f} bytes per ordinary token"
        )


if __name__ == "__main__":
    main()
