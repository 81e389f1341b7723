"""Files: every write is atomic, and what is read is never executed.

A .pt file is read with torch's weights_only; a broken file is a UserError. Knows no model and no SAE.
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
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from sae.flags import UserError

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
    except (OSError, safetensors.SafetensorError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"cannot write '{path}': {reason}; choose another folder or free some space") from e
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


def write_torch(value: Any, path: Path) -> None:
    def write(tmp: Path) -> None:
        try:
            torch.save(value, tmp)
        except RuntimeError as e:  # torch's writer raises it when the disk is full
            raise OSError(str(e).splitlines()[0]) from e

    write_atomic(path, write)


def read_torch(path: str | Path, device: torch.device | str = "cpu", *, mmap: bool = False) -> Any:
    """The content of a .pt file: tensors and plain containers. A file with anything else is refused, never executed.

    mmap: read only the parts of tensors that are used.
    """
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
    whole = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    write_atomic(path, lambda tmp: safetensors.torch.save_file(whole, tmp))


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    if not Path(path).is_file():
        raise UserError(f"'{path}' does not exist; give a safetensors file")
    with one_sentence(f"'{path}' is damaged or no safetensors file", "fetch or write it again"):
        return safetensors.torch.load_file(path)


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
