"""Files: every write is atomic, and reading runs no code from a file.

A .pt file is read with torch's weights_only; a broken file is a UserError. Knows no model and no SAE, and loads
torch only to read or write tensors.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import stat
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sae.flags import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent  # the repository that holds sae/


@contextmanager
def one_sentence(what: str, todo: str) -> Iterator[None]:
    """Any error of the block, which reads what others made, becomes a UserError: `what (its first line); todo`."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:  # a broken file can raise anything
        lines = (repr(e) if isinstance(e, LookupError) else str(e)).strip().splitlines() or [type(e).__name__]
        reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        raise UserError(f"{what} ({reason}); {todo}") from e


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, force it to disk, then put it in place in one move."""
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tmp.open("wb") as f:
            mode = os.fstat(f.fileno()).st_mode  # as the umask says; safetensors' own are private
        write(tmp)
        tmp.chmod(stat.S_IMODE(mode))
        with tmp.open("rb+") as f:
            os.fsync(f.fileno())
        tmp.replace(path)
    except OSError as e:
        raise UserError(f"cannot write '{path}': {e.strerror or e}; choose another folder or free some space") from e
    finally:
        if tmp.parent.is_dir():
            tmp.unlink(missing_ok=True)


def check_writable(folder: Path, flag: str) -> None:
    """Raise UserError, before hours of work, if nothing can be written to the folder that a flag names."""
    probe = folder / f".probe.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise UserError(f"cannot write to '{folder}' ({e.strerror}); choose another {flag}") from e


def write_json(value: Any, path: Path) -> None:
    text = json.dumps(without_nan(value), indent=1) + "\n"
    write_atomic(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))


def without_nan(value: Any) -> Any:
    """The value with null for NaN and infinity, which json does not have."""
    if isinstance(value, dict):
        return {k: without_nan(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_tensors(path: Path, write: Callable[[Path], object], error: type[Exception]) -> None:
    """write_atomic with torch's or safetensors' own writer. error: what it raises when the disk is full."""

    def fill(tmp: Path) -> None:
        try:
            write(tmp)
        except error as e:
            raise OSError(str(e).splitlines()[0]) from e

    write_atomic(path, fill)


def write_torch(value: Any, path: Path) -> None:
    import torch

    _write_tensors(path, lambda tmp: torch.save(value, tmp), RuntimeError)


def read_torch(path: str | Path, device: torch.device | str = "cpu", *, mmap: bool = False) -> Any:
    """The content of a .pt file: tensors and plain containers. A file with anything else is refused, never executed.

    mmap: read only the parts of tensors that are used.
    """
    import torch

    if not Path(path).is_file():
        raise UserError(f"'{path}' does not exist; give a .pt file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on pickles it then refuses
            mmap = mmap and zipfile.is_zipfile(path)  # torch's old format cannot be mapped
            return torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except Exception as e:  # a broken file can raise anything
        if "unsupported global" in str(e).lower():
            raise UserError(f"'{path}' is refused: it wants to run code; save plain tensors instead") from e
        raise UserError(f"'{path}' is damaged, cut short or no .pt file of torch's; copy or save it again") from e


def write_safetensors(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    _write_tensors(path, lambda tmp: save_file(whole, tmp), SafetensorError)


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise UserError(f"'{path}' does not exist; give a safetensors file")
    with one_sentence(f"'{path}' is damaged or no safetensors file", "fetch or write it again"):
        return load_file(path)


def lock(path: Path, busy: str) -> int:
    """Lock a file or folder until os.close of what is returned. Raises UserError(busy) if another process has it."""
    import fcntl

    held = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        os.close(held)
        raise UserError(busy) from e
    return held


def append_line(path: Path, value: Any, *, sync: bool = True) -> None:
    """Append a json line to a journal. sync: return once it is on disk."""
    with path.open("a", encoding="ascii") as f:
        f.write(json.dumps(value) + "\n")
        f.flush()
        if sync:
            os.fsync(f.fileno())


def open_journal(path: Path, keep: Callable[[Any], object] | None = None, *, todo: str = "delete it") -> list[Any]:
    """The lines of a journal, which is made if need be. A last line that a kill tore is dropped from the file.

    keep: skip lines for which it is false or fails, and drop those at the end. Without it a line that is not json is a
    UserError that ends in `todo`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    text = path.read_bytes()
    lines, at, end = [], 0, 0
    for line in text[: text.rfind(b"\n") + 1].splitlines(keepends=True):
        at += len(line)
        try:
            value = json.loads(line)
            if keep is None or keep(value):
                lines.append(value)
                end = at
        except (ValueError, LookupError, TypeError) as e:
            if keep is None:
                raise UserError(f"'{path}' is damaged ({e}); {todo}") from e
    os.truncate(path, end)
    return lines


def beside(path: str) -> ModuleType:
    """Import a Python file of the repository that holds sae/ (model.py of pygpt, or of anyone's nanoGPT)."""
    file = ROOT / path
    name = file.stem
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(file):
        return loaded
    if not file.is_file():
        raise UserError(f"'{path}' is not beside the sae folder; run from a clone of the repository")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)
    spec.loader.exec_module(module)
    return module
