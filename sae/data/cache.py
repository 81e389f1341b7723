"""Activations on disk: the source that reads them in shuffled blocks, and the folders that sae_collect writes.

A folder holds raw shards and a manifest that records exactly what they were made from; a stale, foreign or incomplete
one is refused with the reason. Files from elsewhere: activation_files.py. Knows nothing of SAEs or training.

Letters: D width.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae import log
from sae.config import UserError, read_json, require
from sae.data.activations import ModelSource
from sae.files import one_sentence
from sae.hooks import Acts

CACHE_VERSION = 2
CACHE_FILE = re.compile(r"manifest\.json|\d{5}_(\d\d|seq)\.bin")
HOOKPOINT = re.compile(r"[\w.-]*\w(@in)?")  # a name becomes a folder, so it must not lead elsewhere
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

BLOCK_ROWS = 4096  # long enough that a disk spends its time reading, not seeking
BLOCK_BYTES = 1 << 25  # and no block is larger than this, however wide the rows

Reader = Callable[[int, int], Tensor]  # (start, stop) -> these rows, (stop - start, D) float32

# --------------------------------------------------------------------------------------------------
# reading what is on disk


@dataclass(eq=False)
class BlockSource:
    """Rows on disk, in contiguous blocks that come in a new random order every pass (in file order without a seed).

    Only one block is held at a time; the Stream's buffer mixes the rows of many. readers: by hookpoint; they agree on
    the rows. Of n_rows those from `cut` on are kept for validation. where: the files' place, for errors. positions:
    rows per sequence where all are equally long, which blocks then do not cut. Raises UserError for a row with NaN or
    infinity.
    """

    readers: dict[str, Reader]
    widths: dict[str, int]
    n_rows: int
    cut: int
    where: str
    positions: int = 1
    seed: int | None = None
    block_rows: int = BLOCK_ROWS

    def __post_init__(self) -> None:
        self.rows, self.kept = range(self.cut), range(self.cut, self.n_rows)
        n = max(1, min(self.block_rows, BLOCK_BYTES // (4 * sum(self.widths.values()))))
        self.block_rows = n - n % self.positions if self.positions < n else n
        self.n_passes = self.block = 0
        self._shuffle()

    def held_out(self) -> BlockSource:
        """The rows kept for validation, as a source of their own."""
        other = copy.copy(self)
        other.rows, other.kept = self.kept, range(0)
        other.n_passes = other.block = 0
        other._shuffle()
        return other

    def __len__(self) -> int:
        return len(self.rows)

    def _shuffle(self) -> None:
        n = -(-len(self.rows) // self.block_rows)
        if self.seed is None:
            self.order = torch.arange(n)
        else:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.n_passes)
            self.order = torch.randperm(n, generator=generator)

    def skip(self) -> int:
        n_rows = len(self._next())
        self.block = min(self.block + 1, len(self.order))
        return n_rows

    def _next(self) -> range:
        """The rows of the next block; none at the end of a pass."""
        at = int(self.order[self.block]) * self.block_rows if self.block < len(self.order) else len(self.rows)
        return self.rows[at : at + self.block_rows]

    def read(self) -> Acts:
        rows = self._next()
        if not rows:
            return {}
        with one_sentence(f"'{self.where}' cannot be read at row {rows.start}", "write it again"):
            acts = {name: read(rows.start, rows.stop) for name, read in self.readers.items()}
        for name, x in acts.items():
            if not torch.isfinite(x).all():
                bad = rows[int((~torch.isfinite(x)).any(1).nonzero()[0])]
                place = f" (sequence {bad // self.positions}, position {bad % self.positions})"
                raise UserError(
                    f"row {bad}{place if self.positions > 1 else ''} of '{name}' in '{self.where}' holds NaN or "
                    "infinity as float32; collect it again, or leave that row out"
                )
        self.block += 1
        return acts

    def rewind(self) -> None:
        self.block, self.n_passes = 0, self.n_passes + 1
        self._shuffle()

    def state_dict(self) -> dict[str, Any]:
        return {"block": self.block, "n_passes": self.n_passes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.block, self.n_passes = state["block"], state["n_passes"]
        self._shuffle()


def first_held_out(n: int, share: float) -> int:
    """The first of n sequences that is held out: the last ones are, at least one of them and never all."""
    return n if n < 2 or share <= 0 else min(n - 1, max(1, round(n * (1 - share))))


# --------------------------------------------------------------------------------------------------
# writing a cache


def write_cache(
    folder: Path,
    source: ModelSource,
    *,
    n_tokens: int,
    dtype: str = "float32",
    shard_tokens: int = 1 << 18,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the next n_tokens rows of a source to `folder`, whole or not at all; returns the manifest.

    Layout: manifest.json, and per shard one raw file for each hookpoint (rows of D values of `dtype`) and one with
    each row's sequence number (int64), which splits off validation.
    """
    folder = folder.resolve()
    check_target(folder, overwrite)
    tmp = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        tmp.mkdir(parents=True)
        shards = _write_shards(tmp, source, n_tokens, DTYPES[dtype], shard_tokens)
        done = sum(shards)
        require(done >= 2, "the dataset gave no tokens to collect; give a longer text")
        of = {name: {"d_in": d, "file": f"{i:02d}"} for i, (name, d) in enumerate(source.widths.items())}
        sizes = {"dtype": dtype, "n_tokens": done, "shards": shards, "hookpoints": of}
        manifest = {"version": CACHE_VERSION, **source.rows.provenance(), **sizes}
        (tmp / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for file in tmp.iterdir():
            with file.open("rb+") as f:
                os.fsync(f.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        tmp.replace(folder)
    except OSError as e:
        raise UserError(f"cannot write '{folder}': {e.strerror}; choose another --output_dir") from e
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return manifest


def _write_shards(folder: Path, source: ModelSource, n_tokens: int, dtype: torch.dtype, shard_tokens: int) -> list[int]:
    """Append one pass of the source, at most n_tokens, to shard files; returns the rows of each shard."""
    shards: list[int] = []
    done = 0
    with log.progress(n_tokens, "collecting") as bar:
        while done < n_tokens and len((block := source.read_numbered())[1]):
            acts, numbers = block
            start = 0
            while start < len(numbers) and done < n_tokens:
                if not shards or shards[-1] == shard_tokens:
                    shards.append(0)
                stop = min(len(numbers), start + shard_tokens - shards[-1], start + n_tokens - done)
                of = {f"{i:02d}": acts[name].to(dtype) for i, name in enumerate(source.widths)} | {"seq": numbers}
                for name, x in of.items():
                    with (folder / f"{len(shards) - 1:05d}_{name}.bin").open("ab") as f:
                        f.write(x[start:stop].cpu().contiguous().view(torch.uint8).numpy().tobytes())
                bar.update(stop - start)
                shards[-1] += stop - start
                done += stop - start
                start = stop
    return shards


def check_target(folder: Path, overwrite: bool) -> None:
    """Raise UserError unless `folder` is new, or holds only a cache and may be overwritten."""
    if not folder.exists():
        return
    if not overwrite:
        raise UserError(f"'{folder}' exists; choose another --output_dir or give --overwrite")
    for name in [p.name for p in folder.iterdir()] if folder.is_dir() else [folder.name]:
        if not CACHE_FILE.fullmatch(name) or not folder.is_dir():
            raise UserError(f"'{folder}' holds '{name}', which no cache does; choose another --output_dir")


# --------------------------------------------------------------------------------------------------
# reading a cache


class CacheSource(BlockSource):
    """The activations in a folder that sae_collect wrote, its last sequences held out.

    order: seed and block_rows. Raises UserError for a folder that is not a whole cache, with the reason.
    """

    def __init__(self, folder: str | Path, *, hookpoints: Sequence[str] = (), val_split: float = 0.05, **order: Any):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        known = self.manifest["hookpoints"]
        for name in hookpoints:
            if name not in known:
                raise UserError(f"'{folder}' holds {', '.join(known)}, not '{name}'; collect that hookpoint first")
        widths = {name: known[name]["d_in"] for name in hookpoints or known}
        readers: dict[str, Reader] = {name: partial(self._rows, name) for name in widths}
        n = self.manifest["n_tokens"]
        # Whole sequences are held out: neighbours in one text are too alike to validate on.
        n_sequences = int(self._numbers(n - 1, n)[0]) + 1
        first = first_held_out(n_sequences, val_split)
        cut = bisect_left(range(n), first, key=lambda row: int(self._numbers(row, row + 1)[0]))
        super().__init__(readers, widths, n, cut, where=str(folder), **order)

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        place, dtype = self.manifest["hookpoints"][name], DTYPES[self.manifest["dtype"]]
        raw = self._read(place["file"], start, stop, place["d_in"] * dtype.itemsize)
        return raw.view(dtype).view(stop - start, place["d_in"]).float()

    def _numbers(self, start: int, stop: int) -> Tensor:
        return self._read("seq", start, stop, 8).view(torch.int64)

    def _read(self, file: str, start: int, stop: int, row_bytes: int) -> Tensor:
        """Raw bytes of rows start..stop, across shards."""
        parts, first = [], 0
        for shard, n in enumerate(self.manifest["shards"]):
            a, b = max(start, first), min(stop, first + n)
            if a < b:
                path, size = self.folder / f"{shard:05d}_{file}.bin", (b - a) * row_bytes
                parts.append(torch.from_numpy(np.fromfile(path, np.uint8, size, offset=(a - first) * row_bytes)))
            first += n
        return torch.cat(parts)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache, once all files are shown to have the size it states."""
    if not (folder / "manifest.json").is_file():
        raise UserError(
            f"'{folder}' is not a cache of activations (no manifest.json); make one with sae_collect, or give a .npy, "
            ".h5, .pt or .safetensors file"
        )
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest, dict) or manifest.get("version") != CACHE_VERSION:
        raise UserError(f"'{folder}' was written by another version; collect it again with --overwrite")
    manifest.setdefault("model_dtype", "float32")  # older folders do not say
    with one_sentence(f"'{folder}/manifest.json' is damaged", "collect it again with --overwrite"):
        sizes = {h["file"]: h["d_in"] * DTYPES[manifest["dtype"]].itemsize for h in manifest["hookpoints"].values()}
        odd = [name for name in manifest["hookpoints"] if not HOOKPOINT.fullmatch(name) or ".." in name]
        odd += [file for file in sizes if not re.fullmatch(r"\d\d", file)]
        needed = ("model", "dataset", "ctx_len", "skip_first", "exclude_tokens", "text_column", "split", "streaming")
        missing = [key for key in needed if key not in manifest]
        if odd or missing or sum(manifest["shards"]) != manifest["n_tokens"]:
            raise KeyError((odd + missing + ["n_tokens"])[0])
        for shard, n in enumerate(manifest["shards"]):
            for file, row_bytes in {**sizes, "seq": 8}.items():
                path = folder / f"{shard:05d}_{file}.bin"
                got = path.stat().st_size if path.is_file() else 0
                if got != n * row_bytes:
                    raise UserError(f"'{path}' has {got} bytes and should have {n * row_bytes}; collect it again")
    return manifest


def refuse_stale(manifest: dict[str, Any], made_from: dict[str, Any], folder: str | Path) -> None:
    """Raise UserError unless the cache was made from exactly this model, tokenizer, text and context length."""
    for key, wanted in made_from.items():
        if key in ("model", "dataset"):
            continue  # names may differ; the hashes decide
        if manifest.get(key) != wanted:
            short = lambda v: str(v)[:12]
            had = short(manifest.get(key))
            also = f" (--model_dtype {had}; for nanochat, NANOCHAT_DTYPE={had} in the environment)"
            raise UserError(
                f"the cache '{folder}' is stale or foreign: its {key} is {had}, yours is {short(wanted)}; "
                f"collect it again, or use what it was made from{also if key == 'model_dtype' else ''}"
            )
