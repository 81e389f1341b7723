"""Compiles native.cpp on first use, and says which tensors its operations can take.

A missing compiler costs speed, not results: every operation has a twin in plain torch (sparse.py, selection.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.cpp")
enabled = True  # sparse.using switches it
_loading = threading.Lock()


def ops(*tensors: Tensor) -> Any:
    """The compiled operations if they can take these tensors: float32, on the CPU, outside autocast; else None."""
    if not enabled or torch.is_autocast_enabled("cpu"):
        return None
    if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in tensors):
        return None
    return _compiled()[0]


class Packed(NamedTuple):
    """A copy of W_enc in 8 bits, for batches of few tokens."""

    rows: Tensor  # (F, D) int8
    about: Tensor  # (3, F): each row's unit, norm and rounding error
    of: Tensor  # the weights copied; held, so that no others can be given their memory
    version: int  # of these weights: each change in place adds 1

    def serves(self, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> bool:
        """Whether it still is a copy of W_enc, and quicker than W_enc itself."""
        same = self.of.data_ptr() == W_enc.data_ptr() and self.version == W_enc._version
        return same and len(x) < 32 and ops(x, W_enc, b_enc) is not None


def pack(W_enc: Tensor) -> Packed | None:
    """W_enc (D, F) in 8 bits. packed_top_k and packed_above find latents with it, and compute their pre-activations
    from W_enc itself. None without compiled operations."""
    rows = W_enc.detach().t()
    # an inference tensor has no version, so changes to it would go unnoticed
    compiled = ops(W_enc) if rows.is_contiguous() and not W_enc.is_inference() else None
    if compiled is None:
        return None
    integers, about = compiled.pack(rows)
    return Packed(integers, about, W_enc.detach(), W_enc._version)


def status() -> str:
    """The kernels that run on the CPU, in words."""
    return "plain torch, as asked" if not enabled else _compiled()[1]


def keep_memory() -> None:
    """Keep freed memory in this process: by default glibc returns that of every large tensor to the system, and the
    next tensor costs page faults. For scripts: it changes the whole process."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            mallopt(option, value)


def ready() -> bool:
    """Whether the CPU's kernels are compiled already; if not, the first use compiles them, which takes a minute."""
    return not enabled or hasattr(torch.ops.nanosae, "moments") or _library().is_file()


@functools.cache
def _compiled() -> tuple[Any, str]:
    try:
        with _loading:  # registering the operations twice would end the process
            if not hasattr(torch.ops.nanosae, "moments"):
                _load()
    except (RuntimeError, OSError) as e:  # no compiler, no ninja, no place to write: torch says which
        reason = str(e).strip().splitlines()[0]
        needs = "they want a C++ compiler and ninja: pip install 'nanosae[fast]'"
        return None, f"plain torch, less than half as fast: C++ ones could not be compiled ({reason}); {needs}"
    return torch.ops.nanosae, f"C++, {torch.backends.cpu.get_cpu_capability()}"


def _load() -> None:
    """Load the compiled file, or compile it in a folder of this process alone and keep the result.

    (In a shared folder torch waits for a lock: for ever, if the process that held it was killed.)
    """
    library = _library()
    if library.is_file():
        with contextlib.suppress(OSError):  # a damaged file is compiled again
            torch.ops.load_library(str(library))
            return
    from torch.utils import cpp_extension

    if shutil.which("ninja") is None:  # pip installs it beside python, which is off the path if the venv is inactive
        os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    flags = _flags()
    with tempfile.TemporaryDirectory() as tmp:
        load = functools.partial(cpp_extension.load, build_directory=tmp, is_python_module=False)
        load(library.stem, [str(SOURCE)], extra_cflags=flags, extra_ldflags=[f for f in flags if f == "-fopenmp"])
        with contextlib.suppress(OSError):  # without a place to keep it, each process compiles
            library.parent.mkdir(parents=True, exist_ok=True)
            partial = library.with_suffix(f".{os.getpid()}")
            shutil.copy(Path(tmp) / library.name, partial)
            partial.replace(library)


def _flags() -> list[str]:
    """The compiler's flags."""
    here = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    return ["-O3", here, "-fno-math-errno", "-fno-trapping-math", *openmp]


@functools.cache
def _library() -> Path:
    """Where the compiled file is kept. Its name tells all that it depends on: several machines may share the folder."""
    made_of = SOURCE.read_bytes() + " ".join([*_flags(), torch.__version__, cpuinfo("flags", "Features")]).encode()
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(folder) / "nanosae" / f"nanosae_{hashlib.sha256(made_of).hexdigest()[:16]}.so"


def cpuinfo(*fields: str) -> str:
    """The first line of /proc/cpuinfo that begins with one of the fields; where there is none, Python's name for the
    processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line for line in lines if line.startswith(fields)), platform.processor())
