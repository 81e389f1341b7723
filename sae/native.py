"""Compiles native.cpp on first use and says where it serves.

A missing compiler costs speed, not results: everything in it has a twin in plain torch (kernels.py).
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("native.cpp")
enabled = True  # set by --kernels


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


def status() -> str:
    """What runs on the CPU, in words."""
    return "plain torch, as asked" if not enabled else _compiled()[1]


def keep_memory() -> None:
    """Let freed memory stay with this process: glibc hands back every large tensor, and pages the next one in."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            mallopt(option, value)


@functools.cache
def _compiled() -> tuple[Any, str]:
    from torch.utils import cpp_extension

    flags = ["-O3", "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"]
    flags += ["-fno-math-errno", "-fno-trapping-math", *(["-fopenmp"] if sys.platform == "linux" else [])]
    # the folder of compiled files may serve several machines
    made_of = SOURCE.read_bytes() + " ".join([*flags, torch.__version__, _processor()]).encode()
    name = f"nanosae_{hashlib.sha256(made_of).hexdigest()[:16]}"
    if shutil.which("ninja") is None:  # pip puts it beside python, which is not on the path of an inactive venv
        os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    try:
        cpp_extension.load(
            name, [str(SOURCE)], extra_cflags=flags, extra_ldflags=flags[4:], is_python_module=False, verbose=False
        )
    except (RuntimeError, OSError) as e:  # no compiler, no ninja, no place to write: torch says which
        reason = str(e).strip().splitlines()[0]
        return None, (
            f"plain torch, about half as fast: C++ ones could not be compiled ({reason}); they want a C++ compiler "
            "and ninja: pip install 'nanosae[fast]'"
        )
    return torch.ops.nanosae, f"C++, {torch.backends.cpu.get_cpu_capability()}"


def _processor() -> str:
    """What -march=native depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
