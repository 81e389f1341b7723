"""Compiles native.cpp on first use and says where it serves.

A missing compiler costs speed, not results: everything in it has a twin in plain torch (kernels.py).
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
    """The compiled operations, if they serve these tensors: float32, on the CPU, outside of autocast; else None."""
    if not enabled or torch.is_autocast_enabled("cpu"):
        return None
    if any(t.device.type != "cpu" or t.dtype != torch.float32 for t in tensors):
        return None
    return _compiled()[0]


def encoder(x: Tensor, *tensors: Tensor) -> Any:
    """`ops`, if they hold an encoder, which wants a processor's wide integer products, and tokens x enough to be worth
    the rounding of all latents; else None."""
    compiled = ops(x, *tensors) if len(x) >= 32 else None
    return compiled if compiled is not None and hasattr(compiled, "encode_top_k") else None


class Packed(NamedTuple):
    """A copy of W_enc in 8 bits: rows (F, D) int8; of each its unit, norm and rounding error (3, F). It serves the
    weights it was made of, `of` and not changed since `version`, for batches of few tokens."""

    rows: Tensor
    about: Tensor
    of: Tensor  # also keeps their memory from being others'
    version: int

    def serves(self, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> bool:
        """Whether it is quicker than W_enc itself, and still its copy."""
        same = self.of.data_ptr() == W_enc.data_ptr() and self.version == W_enc._version
        return same and len(x) < 32 and ops(x, W_enc, b_enc) is not None


def pack(W_enc: Tensor) -> Packed | None:
    """W_enc (D, F) in 8 bits, for operations that find latents with it and compute what they find from W_enc itself;
    None where there are none."""
    rows = W_enc.detach().t()
    compiled = ops(W_enc) if rows.is_contiguous() and not W_enc.is_inference() else None  # whose changes none counts
    if compiled is None:
        return None
    integers, about = compiled.pack(rows)
    return Packed(integers, about, W_enc.detach(), W_enc._version)


def status() -> str:
    """What runs on the CPU, in words."""
    return "plain torch, as asked" if not enabled else _compiled()[1]


def keep_memory() -> None:
    """Let freed memory stay with this process: glibc hands back every large tensor, and pages the next one in."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            mallopt(option, value)


def ready() -> bool:
    """Whether what runs on the CPU is there already; else the first use compiles it, which takes a while."""
    return not enabled or hasattr(torch.ops.nanosae, "moments") or _library().is_file()


@functools.cache
def _compiled() -> tuple[Any, str]:
    try:
        with _loading:  # a second copy of the operations would end the process
            if not hasattr(torch.ops.nanosae, "moments"):
                _load()
    except (RuntimeError, OSError) as e:  # no compiler, no ninja, no place to write: torch says which
        reason = str(e).strip().splitlines()[0]
        return None, (
            f"plain torch, less than half as fast: C++ ones could not be compiled ({reason}); they want a C++ compiler "
            "and ninja: pip install 'nanosae[fast]'"
        )
    return torch.ops.nanosae, f"C++, {torch.backends.cpu.get_cpu_capability()}"


def _load() -> None:
    """Load the compiled file, or compile in a folder of this process alone and keep the result.

    (In a shared folder torch waits for a lock, for ever if who held it was killed.)
    """
    library = _library()
    if library.is_file():
        with contextlib.suppress(OSError):  # a damaged one is made anew
            torch.ops.load_library(str(library))
            return
    from torch.utils import cpp_extension

    if shutil.which("ninja") is None:  # pip puts it beside python, which is not on the path of an inactive venv
        os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    flags = _flags()
    with tempfile.TemporaryDirectory() as tmp:
        cpp_extension.load(
            library.stem, [str(SOURCE)], extra_cflags=flags, extra_ldflags=[f for f in flags if f == "-fopenmp"],
            build_directory=tmp, is_python_module=False, verbose=False,
        )  # fmt: skip
        with contextlib.suppress(OSError):  # no place to keep it
            library.parent.mkdir(parents=True, exist_ok=True)
            partial = library.with_suffix(f".{os.getpid()}")
            shutil.copy(Path(tmp) / library.name, partial)
            partial.replace(library)


def _flags() -> list[str]:
    """For the compiler."""
    here = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    return ["-O3", here, "-fno-math-errno", "-fno-trapping-math", *openmp]


@functools.cache
def _library() -> Path:
    """Where the compiled file is kept, named by all that it depends on: the folder may serve several machines."""
    made_of = SOURCE.read_bytes() + " ".join([*_flags(), torch.__version__, _processor()]).encode()
    folder = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(folder) / "nanosae" / f"nanosae_{hashlib.sha256(made_of).hexdigest()[:16]}.so"


def _processor() -> str:
    """What -march=native depends on."""
    return cpuinfo("flags", "Features")


def cpuinfo(*fields: str) -> str:
    """The first line on a processor that begins with one of these, where Linux tells; else what Python calls it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line for line in lines if line.startswith(fields)), platform.processor())
