"""Activation files made by other tools: rows of .npy, .h5, .pt and .safetensors files of any size.

A tensor [n, T, d] is n sequences of T tokens, a tensor [n, d] is n tokens. One block of rows is in memory at a time.
Nothing in a file is executed, and a tensor that does not fit is refused with the reason. Knows nothing of SAEs.

Letters: N sequences, T positions, D width.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from sae import log
from sae.config import UserError, require
from sae.data.cache import HOOKPOINT, BlockSource, first_held_out
from sae.files import one_sentence, read_torch

FLOATS = ("float16", "bfloat16", "float32", "float64")
WANTED = f"[sequences, positions, width] or [tokens, width] of {', '.join(FLOATS)} was wanted"
SAFETENSORS_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
MEGABYTE = 1 << 20


class Array(NamedTuple):
    """One tensor of a file: its shape, its dtype's name, and a function that opens it to be sliced."""

    shape: tuple[int, ...]
    dtype: str
    open: Callable[[], Any]

    @property
    def misfit(self) -> str | None:
        """Why this tensor holds no activations, or None."""
        if self.dtype not in FLOATS or len(self.shape) not in (2, 3):
            return f"{self.dtype} of shape {list(self.shape)}"
        return f"empty (shape {list(self.shape)})" if 0 in self.shape else None

    @property
    def n_rows(self) -> int:
        return self.shape[0] * self.positions

    @property
    def positions(self) -> int:
        return self.shape[1] if len(self.shape) == 3 else 1

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start..stop as (rows, D) float32; the rows of [n, T, d] are numbered across sequences."""
        x, T = self.open(), self.positions
        parts = []
        while start < stop:
            i, t = divmod(start, T)
            if len(self.shape) == 2:
                part = x[start:stop]
            elif t == 0 and stop - start >= T:
                part = x[i : i + (stop - start) // T]
            else:
                part = x[i : i + 1, t : min(T, t + stop - start)]
            parts.append(_float32(part).reshape(-1, self.shape[-1]))
            start += len(parts[-1])
        return torch.cat(parts)


def _float32(x: Any) -> Tensor:
    """A copy that keeps no file open; values too large for float32 become infinite."""
    if isinstance(x, Tensor):
        return x.detach().to(torch.float32, copy=True)
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.array(x, dtype=np.float32))


# --------------------------------------------------------------------------------------------------
# what each kind of file holds: {name: Array}


def _npy(path: Path) -> dict[str, Array]:
    whole = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(whole, np.memmap):
        whole.close()
        raise ValueError("it is an archive, not one array")
    order: Any = "C" if whole.flags.c_contiguous else "F"
    # mapped for a block at a time: pages of a mapping that stays open count as memory in use
    open_ = partial(np.memmap, path, whole.dtype, "r", whole.offset, whole.shape, order)
    return {path.stem: Array(whole.shape, whole.dtype.name, open_)}


def _h5(path: Path) -> dict[str, Array]:
    try:
        import h5py
    except ImportError as e:
        raise UserError(f"'{path}' needs a library to be read: pip install 'nanosae[h5]'") from e
    file = h5py.File(path, "r")
    found: dict[str, Array] = {}

    def keep(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = Array(item.shape or (), item.dtype.name, lambda: file[name])

    file.visititems(keep)
    return found


def _pt(path: Path) -> dict[str, Array]:
    tensors = _named(read_torch(path, mmap=True), path)
    if zipfile.is_zipfile(path):  # mapped for a block at a time, as in _npy
        open_ = lambda name: _named(read_torch(path, mmap=True), path)[name]
    else:
        log.once(f"'{path.name}' is in torch's old format and read into memory whole; save it anew to spare that")
        open_ = tensors.__getitem__
    return {name: Array(tuple(x.shape), _dtype(x), partial(open_, name)) for name, x in tensors.items()}


def _named(held: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(held, Tensor):
        return {path.stem: held}
    tensors = {str(k): v for k, v in held.items() if isinstance(v, Tensor)} if isinstance(held, dict) else {}
    require(bool(tensors), f"'{path}' holds a {type(held).__name__}; a tensor, or a dict of tensors, was wanted")
    return tensors


def _dtype(x: Tensor) -> str:
    name = str(x.dtype).removeprefix("torch.")
    return name if x.layout == torch.strided else f"{x.layout} {name}"


def _safetensors(path: Path) -> dict[str, Array]:
    def load(name: str) -> Any:
        return safe_open(path, "pt").get_slice(name)

    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: Array(tuple(x.get_shape()), SAFETENSORS_DTYPES.get(x.get_dtype(), x.get_dtype()), partial(load, name))
            for name, x in slices.items()
        }


KINDS = {".npy": _npy, ".h5": _h5, ".hdf5": _h5, ".pt": _pt, ".safetensors": _safetensors}


# --------------------------------------------------------------------------------------------------
# choosing among what a file holds


def split_name(given: str) -> tuple[Path, str | None]:
    """'acts.h5:layer_3' is the tensor layer_3 in acts.h5; an ActivationCollector's folder is its file."""
    collected = Path(given) / "activations.safetensors"
    if collected.is_file():
        return collected, None
    endings = "|".join(re.escape(kind) for kind in KINDS)
    named = re.fullmatch(rf"(.+(?:{endings})):(.+)", given)
    return (Path(named[1]), named[2]) if named and not Path(given).exists() else (Path(given), None)


def is_activation_file(given: str) -> bool:
    """Whether a path is named like a file that this module reads (a folder is none)."""
    path, _ = split_name(given)
    return path.suffix in KINDS and not path.is_dir()


def list_arrays(path: Path) -> dict[str, Array]:
    """Everything that a file holds, by name. Raises UserError if it cannot be read."""
    if not path.is_file():
        raise UserError(f"'{path}' does not exist; give a {', '.join(KINDS)} file, or a folder that sae_collect wrote")
    with one_sentence(f"'{path}' cannot be read", f"a whole {path.suffix} file of numbers was wanted"):
        return KINDS[path.suffix](path)


def choose(path: Path, arrays: dict[str, Array], wanted: Sequence[str]) -> dict[str, Array]:
    """The arrays wanted, or all that hold activations; several in one .h5 must be asked for by name."""
    arrays = {name.strip("/"): array for name, array in arrays.items()}
    what = lambda names: ", ".join(f"'{n}' ({arrays[n].misfit or list(arrays[n].shape)})" for n in sorted(names)[:8])
    chosen = {}
    for name in (n.strip("/") for n in wanted):
        if name not in arrays:
            raise UserError(f"'{path}' holds {what(arrays) or 'nothing'}, not '{name}'; choose among these")
        if arrays[name].misfit:
            raise UserError(f"'{name}' in '{path}' is {arrays[name].misfit}; {WANTED}")
        chosen[name] = arrays[name]
    if chosen:
        return chosen
    fitting = {name: array for name, array in arrays.items() if not array.misfit}
    if not fitting:
        raise UserError(f"'{path}' holds {what(arrays) or 'no tensor'}; {WANTED}")
    if len(fitting) > 1 and KINDS[path.suffix] is _h5:
        first = min(fitting)
        raise UserError(
            f"'{path}' holds several datasets that fit: {what(fitting)}; choose one with {path}:{first}, or several "
            "with --hookpoints"
        )
    if left_out := arrays.keys() - fitting.keys():
        log.once(f"left out of '{path.name}', being no activations: {what(left_out)}")
    return fitting


def as_hookpoints(arrays: dict[str, Array], hook_point: str = "") -> dict[str, Array]:
    """The arrays under names fit for hookpoints: a name becomes a folder, so it must not lead elsewhere.

    hook_point: a name for the only array.
    """
    if hook_point:
        require(
            len(arrays) == 1, f"--hook_point names one hookpoint and {len(arrays)} were chosen: {', '.join(arrays)}"
        )
        good = HOOKPOINT.fullmatch(hook_point) and ".." not in hook_point
        require(bool(good), f"--hook_point '{hook_point}' is no name of a module, such as transformer.h.3.mlp")
        return dict(zip([hook_point], arrays.values(), strict=True))
    found: dict[str, Array] = {}
    for given, array in arrays.items():
        name = re.sub(r"[^\w.@-]+", "_", given.replace("/", "."))
        name = re.sub(r"\.{2,}", ".", name).strip(".") or "activations"
        require(name not in found, f"two of the chosen tensors would be named '{name}'; choose one with --hookpoints")
        found[name] = array
    return found


class FileSource(BlockSource):
    """The activations in a file, by the names of its tensors (or the file's name, of a single tensor).

    given: a path, or path:name. hookpoints: some of the names. hook_point: another name for the only tensor. The last
    sequences are held out, or the last rows of a [n, d]. order: seed and block_rows. Raises UserError.
    """

    def __init__(
        self, given: str, *, hookpoints: Sequence[str] = (), val_split: float = 0.05, hook_point: str = "", **order: Any
    ):
        self.path, name = split_name(given)
        if name and hookpoints:
            raise UserError(f"'{given}' names a tensor and --hookpoints was given too; give one of them")
        chosen = choose(self.path, list_arrays(self.path), [name] if name else hookpoints)
        self.arrays = as_hookpoints(chosen, hook_point)
        if len({(a.n_rows, a.positions) for a in self.arrays.values()}) > 1:
            shapes = ", ".join(f"'{n}' {list(a.shape)}" for n, a in self.arrays.items())
            raise UserError(f"'{self.path}' holds tensors of different lengths ({shapes}); choose with --hookpoints")
        one = next(iter(self.arrays.values()))
        super().__init__(
            {name: array.read for name, array in self.arrays.items()},
            {name: array.shape[-1] for name, array in self.arrays.items()},
            one.n_rows,
            first_held_out(one.shape[0], val_split) * one.positions,
            str(self.path),
            one.positions,
            **order,
        )

    def provenance(self) -> dict[str, Any]:
        """Identifies the file, so that a resumed run can tell whether it has changed."""
        size = self.path.stat().st_size
        with self.path.open("rb") as file:
            ends = hashlib.sha256(file.read(MEGABYTE))
            file.seek(max(0, size - MEGABYTE))
            ends.update(file.read(MEGABYTE))
        tensors = {name: {"shape": list(a.shape), "dtype": a.dtype} for name, a in self.arrays.items()}
        return {"file": self.path.name, "file_bytes": size, "file_ends_sha256": ends.hexdigest(), "tensors": tensors}
