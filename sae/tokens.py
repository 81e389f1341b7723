"""From the name of a dataset to rows of token ids: documents, packing, the held-out split, which positions count.

Every reader is a place in the data: it can be saved and gone on from. Knows nothing of activations or SAEs.

Letters: N sequences, T positions.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.config import UserError, require
from sae.language_model import LanguageModel, beside

HOLD_OUT = 20  # every 20th sequence validates where a dataset has no split of its own
PIECE_BYTES = 1 << 20  # a longer text file is read as several documents, cut at line ends

# --------------------------------------------------------------------------------------------------
# datasets: names -> documents


@dataclass
class Dataset:
    """Where documents come from. A document is a text, a chat (list of role/content) or an array of token ids.

    documents(split) starts from the first document every time; split is "train" or "val", which differ only if
    has_split. fingerprint() is a sha256 of the content.
    """

    name: str
    has_split: bool
    documents: Callable[[str], Iterator[Any]]
    fingerprint: Callable[[], str]
    text_column: str = "text"


def open_dataset(name: str | None = None, *, text_column: str = "text") -> Dataset:
    """The dataset `name` means: None for the embedded corpus, else a file or folder (see DataConfig.dataset)."""
    if name is None:
        corpus = beside("assets/pygpt/corpus.py")
        sources = lambda: [Path(str(corpus.__file__)), *(file for file, _ in corpus.library_files())]
        return Dataset("embedded", True, corpus.documents, lambda: _hash_files(sources()))
    path = Path(name)
    if not name or not _exists(path):
        raise UserError(f"dataset '{name}' does not exist; give a text, jsonl or .bin file, or a folder of them")
    if path.is_dir() and (path / "train.bin").is_file():
        files = {split: path / f"{split}.bin" for split in ("train", "val")}
        has_val = files["val"].is_file()
        read = lambda split: _token_pieces(files[split] if has_val else files["train"])
        return Dataset(name, has_val, read, lambda: _hash_files([f for f in files.values() if f.is_file()]))
    hidden = lambda p: any(part.startswith(".") for part in p.relative_to(path).parts)
    files_ = sorted(p for p in path.rglob("*") if p.is_file() and not hidden(p)) if path.is_dir() else [path]
    require(bool(files_), f"folder '{name}' holds no files; give text, jsonl or .bin files")

    def documents(_split: str) -> Iterator[Any]:
        for file in files_:
            yield from _file_documents(file, text_column)

    return Dataset(name, False, documents, lambda: _hash_files(files_), text_column)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long to be one
        return False


def _file_documents(file: Path, text_column: str) -> Iterator[Any]:
    if file.suffix == ".bin":
        yield from _token_pieces(file)
        return
    try:
        with file.open(encoding="utf-8") as f:
            if file.suffix in (".jsonl", ".ndjson"):
                for number, line in enumerate(f, 1):
                    if line.strip():
                        yield _json_text(line, text_column, f"{file}:{number}")
                return
            while piece := f.read(PIECE_BYTES):
                yield piece + f.readline()
    except UnicodeDecodeError as e:
        raise UserError(f"'{file}' is not utf-8 text ({e.reason} at byte {e.start}); convert it or leave it out") from e
    except OSError as e:
        raise UserError(f"cannot read '{file}': {e.strerror}") from e


def _json_text(line: str, column: str, where: str) -> Any:
    try:
        record = json.loads(line)
    except ValueError as e:
        raise UserError(f"{where} is not json ({e}); a jsonl file holds one object a line") from e
    text = record if isinstance(record, str) else record.get(column) if isinstance(record, dict) else None
    if not isinstance(text, str):
        fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{where} has no text field '{column}' (it has: {fields}); choose one with --text_column")
    return text


def _token_pieces(file: Path) -> Iterator[np.ndarray]:
    """A nanoGPT .bin (uint16 ids) in pieces, so that nothing of its size is held in memory."""
    if file.stat().st_size % 2:
        raise UserError(f"'{file}' has an odd number of bytes; a nanoGPT .bin holds uint16 token ids")
    if file.stat().st_size == 0:
        return
    ids = np.memmap(file, dtype=np.uint16, mode="r")
    for start in range(0, len(ids), PIECE_BYTES):
        yield ids[start : start + PIECE_BYTES]


def _hash_files(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# token rows


class TokenRows:
    """Documents cut into rows of T tokens, from any place on: `state_dict` is a place.

    For a next-token model documents are packed one behind the other (each begins with its bos); for an encoder every
    row is a piece of one document wrapped in [CLS] ... [SEP]. Without a split of the dataset's own, every 20th row
    is "val". The last row may be short; `take` pads it and says which positions are real.
    """

    def __init__(self, lm: LanguageModel, dataset: Dataset, split: str, ctx_len: int):
        self.lm, self.dataset, self.split = lm, dataset, split
        self.ctx_len = min(ctx_len, lm.max_len)
        if lm.wrap is not None and self.ctx_len < 3:
            raise UserError(f"ctx_len={self.ctx_len} has no room between an encoder's [CLS] and [SEP]; raise --ctx_len")
        self.rewind()

    def rewind(self) -> None:
        """Start over at the first document."""
        self.load_state_dict({"n_documents": 0, "n_rows": 0, "carry": [], "queue": [], "ended": False})

    def state_dict(self) -> dict[str, Any]:
        return {
            "n_documents": self.n_documents, "n_rows": self.n_rows, "carry": list(self.carry),
            "queue": [list(row) for row in self.queue], "ended": self.ended,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n_documents, self.n_rows = state["n_documents"], state["n_rows"]
        self.carry, self.ended = list(state["carry"]), state["ended"]
        self.queue = deque(state["queue"])
        self._documents = islice(self.dataset.documents(self.split), self.n_documents, None)

    def take(self, n: int) -> tuple[Tensor, Tensor]:
        """The next n rows, fewer at the end of the data: ids (n, T) int64 and valid (n, T) bool."""
        rows: list[list[int]] = []
        while len(rows) < n and self._ready():
            row = self.queue.popleft()
            held_out = self.n_rows % HOLD_OUT == HOLD_OUT - 1
            self.n_rows += 1
            if self.dataset.has_split or held_out == (self.split == "val"):
                rows.append(row)
        ids = torch.full((len(rows), self.ctx_len), self.lm.pad_id, dtype=torch.int64)
        valid = torch.zeros(len(rows), self.ctx_len, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            valid[i, : len(row)] = True
        return ids, valid

    def _ready(self) -> bool:
        """Whether a row is in the queue, after reading on if need be."""
        while not self.queue and not self.ended:
            document = next(self._documents, None)
            if document is None:
                self.ended = True
                if len(self.carry) >= 2:
                    self.queue.append(self.carry)
                self.carry = []
            else:
                self.n_documents += 1
                self._cut(document)
        return bool(self.queue)

    def _cut(self, document: Any) -> None:
        if self.lm.wrap is not None:
            first, last = self.lm.wrap
            ids = self._encode(document, whole=False)
            step = self.ctx_len - 2
            self.queue.extend([first, *ids[i : i + step], last] for i in range(0, len(ids), step))
            return
        ids = self.carry + self._encode(document, whole=True)
        n = len(ids) // self.ctx_len * self.ctx_len
        self.queue.extend(ids[i : i + self.ctx_len] for i in range(0, n, self.ctx_len))
        self.carry = ids[n:]

    def _encode(self, document: Any, *, whole: bool) -> list[int]:
        if isinstance(document, np.ndarray):
            if len(document) and int(document.max()) >= self.lm.tokenizer.vocab_size:
                raise UserError(
                    f"'{self.dataset.name}' holds token {int(document.max())} and the model knows "
                    f"{self.lm.tokenizer.vocab_size}; the .bin was made with another tokenizer"
                )
            return document.tolist()
        try:
            if whole:
                return self.lm.tokenizer.encode_document(document)
            text = document if isinstance(document, str) else "\n".join(m["content"] for m in document)
            return self.lm.tokenizer.encode(text)
        except ValueError as e:
            raise UserError(f"dataset '{self.dataset.name}': {e}") from e


def kept_positions(lm: LanguageModel, ids: Tensor, valid: Tensor, *, skip_first: bool = False) -> Tensor:
    """(N, T) bool: positions that train and count: real, not a special token, and not the first if so asked.

    Attention sinks at the first position and special tokens carry norms that would drown everything else.
    """
    special = torch.tensor(sorted(lm.tokenizer.special_ids), dtype=ids.dtype, device=ids.device)
    keep = valid & ~torch.isin(ids, special)
    if skip_first:
        keep[:, 0] = False
    return keep
