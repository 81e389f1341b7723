"""Where and when a figure was measured: every file of results says so in these words."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

import torch

from sae.kernels import native
from sae.rundir import git_commit


def about() -> dict[str, Any]:
    """This machine and this code, now."""
    return {
        "commit": git_commit(),
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def processor() -> str:
    """What it calls itself."""
    return native.cpuinfo("model name").split(":")[-1].strip()
