"""From documents to rows of token ids: the held-out part, tokenising in threads, packing, which positions count.

A reader's state is a place in the data, from which another can continue. Knows nothing of activations or SAEs.

Letters: N sequences, T positions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from itertools import chain, count, groupby, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.config import UserError
from sae.data.datasets import Dataset
from sae.lm.language_model import LanguageModel

HOLD_OUT = 20  # every 20th piece of a text validates if the dataset has no split of its own
PIECE_CHARS = 8192
LONGEST_CHARS = 1 << 20  # a longer document is encoded, and packed, as several
CHARS_PER_TOKEN = 4  # roughly, for documents that are token ids
BATCH_DOCUMENTS, BATCH_CHARS = 64, 1 << 18  # what a thread gets to encode at a time

# --------------------------------------------------------------------------------------------------
# documents -> those of one split


def documents_of_split(dataset: Dataset, split: str) -> Iterator[Any]:
    """The documents of split "train" or "val"; long ones in parts.

    Where a dataset has no split of its own, texts are cut into pieces of about 8000 characters (a short document or a
    chat is one piece), and every 20th of them is held out: the second, the 22nd and so on, so that a short text has one
    too. The text alone decides, not the context length or the model. Neighbouring pieces stay together.
    """
    if dataset.has_split:
        for document in dataset.documents(split):
            first = 0
            for end in _piece_ends(document, LONGEST_CHARS):
                yield document[first:end]
                first = end
        return
    number = count()
    for document in dataset.documents(split):
        start = 0
        for held, ends in groupby(_piece_ends(document, PIECE_CHARS), lambda _: next(number) % HOLD_OUT == 1):
            *_, end = ends
            if held == (split == "val"):
                yield document[start:end]
            start = end


def _piece_ends(document: Any, n_chars: int) -> Iterator[int]:
    """The ends of a document's pieces: in a text at the end of a line, or else of a word."""
    n, end = len(document), 0
    size = n_chars if isinstance(document, str) else n_chars // CHARS_PER_TOKEN if _is_ids(document) else n
    while end < n:
        end += size
        if n - end < size // 2:
            end = n
        elif isinstance(document, str):
            line, space = document.find("\n", end, end + size), document.find(" ", end, end + size)
            end = line + 1 if line >= 0 else space if space >= 0 else end
        yield end


def _is_ids(document: Any) -> bool:
    return isinstance(document, np.ndarray)


# --------------------------------------------------------------------------------------------------
# encoding in threads


def _batches(documents: Iterator[Any]) -> Iterator[list[Any]]:
    """Documents in batches; an error of the reader takes the place of the document that it could not read."""
    batch: list[Any] = []
    n_chars = 0
    try:
        for document in documents:
            batch.append(document)
            n_chars += len(document)
            if len(batch) == BATCH_DOCUMENTS or n_chars >= BATCH_CHARS:
                yield batch
                batch, n_chars = [], 0
    except UserError as e:
        batch.append(e)
    if batch:
        yield batch


def _in_order(work: Callable[[Any], Any], items: Iterable[Any], n_threads: int) -> Iterator[Any]:
    """work(item) for each, in order; several threads work ahead of the reader."""
    if n_threads == 1:
        yield from map(work, items)
        return
    pending: deque[Future] = deque()
    with ThreadPoolExecutor(n_threads, "tokenise") as pool:
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                while pending and (len(pending) > 2 * n_threads or pending[0].done()):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


# --------------------------------------------------------------------------------------------------
# token rows


class Rows(NamedTuple):
    """Sequences: ids (N, T) int64, which positions are real, and which of those train and count (bool)."""

    ids: Tensor
    valid: Tensor
    keep: Tensor


@dataclass(eq=False)
class TokenRows:
    """Documents cut into rows of T tokens; `state_dict` is a place to continue from.

    For a next-token model documents are packed one after the other (each begins with its bos, or ends with its eos
    if there is no bos); for an encoder every row is a piece of one document wrapped in [CLS] ... [SEP]. Documents
    that are token ids are taken as they are. The last row may be short; `take` pads it and says which positions are
    real: token ids cannot, because many models pad with the token that ends a text.

    skip_first, exclude_tokens: positions that do not count (kept_positions). n_threads encode ahead of `take`; the rows
    are the same for any number.
    """

    lm: LanguageModel
    dataset: Dataset
    split: str
    ctx_len: int
    _: KW_ONLY
    skip_first: bool = False
    exclude_tokens: Sequence[int] = ()
    n_threads: int = 1

    def __post_init__(self) -> None:
        self.ctx_len = min(self.ctx_len, self.lm.max_len)
        if self.lm.wrap is not None and self.ctx_len < 3:
            raise UserError(f"ctx_len={self.ctx_len} has no room between an encoder's [CLS] and [SEP]; raise --ctx_len")
        if self.n_threads > 1:
            self.lm.tokenizer.encode("")  # a tokenizer may set itself up on first use: before threads share it
        self.rewind()

    def rewind(self) -> None:
        """Start over at the first document."""
        self.load_state_dict({"n_documents": 0, "n_rows": 0, "carry": [], "queue": [], "ended": False})

    def state_dict(self) -> dict[str, Any]:
        queue = [list(row) for row in self.queue]
        counts = {"n_documents": self.n_documents, "n_rows": self.n_rows, "ended": self.ended}
        return {**counts, "carry": list(self.carry), "queue": queue}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n_documents, self.n_rows = state["n_documents"], state["n_rows"]
        self.carry, self.ended = list(state["carry"]), state["ended"]
        self.queue = deque(state["queue"])
        # documents that were encoded ahead and not cut are read again
        documents = islice(documents_of_split(self.dataset, self.split), self.n_documents, None)
        batches = _in_order(lambda batch: [self._encode(d) for d in batch], _batches(documents), self.n_threads)
        self._encoded = chain.from_iterable(batches)

    def take(self, n: int) -> Rows:
        """The next n rows, fewer at the end of the data."""
        rows: list[list[int]] = []
        while len(rows) < n and self._ready():
            rows.append(self.queue.popleft())
        self.n_rows += len(rows)
        ids = torch.full((len(rows), self.ctx_len), self.lm.pad_id, dtype=torch.int64)
        valid = torch.zeros(len(rows), self.ctx_len, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            valid[i, : len(row)] = True
        keep = kept_positions(self.lm, ids, valid, skip_first=self.skip_first, exclude_tokens=self.exclude_tokens)
        return Rows(ids, valid, keep)

    def until(self, n_tokens: int, n: int) -> Iterator[Rows]:
        """Whole sequences, n at a time, until n_tokens that count were seen; the same sequences for any n."""
        n_seen = 0
        while n_seen < n_tokens and len((rows := self.take(n)).ids):
            counts = rows.keep.sum(1)
            some = int((n_seen + counts.cumsum(0) - counts < n_tokens).sum())
            yield Rows(*(x[:some] for x in rows))
            n_seen += int(counts[:some].sum())

    def provenance(self) -> dict[str, Any]:
        """Everything that determines these rows' activations, for a cache's manifest."""
        lm, dataset = self.lm, self.dataset
        model = {"model": lm.name, "model_dtype": lm.dtype, "model_hash": lm.weights_hash}
        text = {"dataset": dataset.name, "dataset_hash": dataset.fingerprint()}
        text |= {name: getattr(dataset, name) for name in ("text_column", "split", "streaming")}
        cut = {"ctx_len": self.ctx_len, "skip_first": self.skip_first, "exclude_tokens": sorted(self.exclude_tokens)}
        return {**model, "tokenizer_hash": lm.tokenizer.content_hash(), **text, **cut}

    def _ready(self) -> bool:
        """Whether a row is in the queue; reads on if there is none."""
        while not self.queue and not self.ended:
            document = next(self._encoded, None)
            if isinstance(document, UserError):
                raise document
            if document is None:
                self.ended = True
                if len(self.carry) >= 2:
                    self.queue.append(self.carry)
                self.carry = []
            else:
                self.n_documents += 1
                self._cut(document)
        return bool(self.queue)

    def _cut(self, ids: list[int]) -> None:
        if self.lm.wrap is None:
            ids = self.carry + ids
            n = len(ids) // self.ctx_len * self.ctx_len
            self.queue.extend(ids[i : i + self.ctx_len] for i in range(0, n, self.ctx_len))
            self.carry = ids[n:]
            return
        first, last = self.lm.wrap
        start = 1 if ids[:1] in ([first], [self.lm.tokenizer.bos_id]) else 0  # wrapped already
        stop = len(ids) - 1 if ids[-1:] == [last] else len(ids)
        step = self.ctx_len - 2
        self.queue.extend([first, *ids[i : min(i + step, stop)], last] for i in range(start, stop, step))

    def _encode(self, document: Any) -> list[int] | UserError:
        """A document's ids, or the error to raise when its turn comes."""
        if isinstance(document, UserError):
            return document
        name, n_known = self.dataset.name, self.lm.tokenizer.vocab_size
        if _is_ids(document):
            low, high = int(document.min()), int(document.max())
            if low < 0 or high >= n_known:
                return UserError(
                    f"'{name}' holds token {low if low < 0 else high} and the model knows {n_known}; "
                    "it was made with another tokenizer"
                )
            return document.tolist()
        try:
            return self.lm.tokenizer.encode_document(document)
        except ValueError as e:
            return UserError(f"dataset '{name}': {e}")


def kept_positions(
    lm: LanguageModel, ids: Tensor, valid: Tensor, *, skip_first: bool = False, exclude_tokens: Sequence[int] = ()
) -> Tensor:
    """(N, T) bool: positions that train and count: real, no special token, and with skip_first not the first.

    Attention sinks at the first position and special tokens have norms that would dominate the loss; exclude_tokens
    are left out too. Raises UserError for one that the model does not know.
    """
    for token in exclude_tokens:
        if not 0 <= token < lm.tokenizer.vocab_size:
            raise UserError(
                f"token {token} cannot be excluded: '{lm.name}' knows 0 to {lm.tokenizer.vocab_size - 1}; "
                "see --exclude_tokens"
            )
    left_out = torch.tensor(sorted({*lm.tokenizer.special_ids, *exclude_tokens}), dtype=ids.dtype, device=ids.device)
    keep = valid & ~torch.isin(ids, left_out)
    if skip_first:
        keep[:, 0] = False
    return keep
