"""Every architecture as SAE, transcoder and skip transcoder, on the same activations with the same tokens.

    python -m scripts.sae_collect --model <MiniLM> --layer 3 --transcode --max_tokens 1200000 --output_dir acts
    python -m benchmarks.architectures acts [--tokens 1000000] [--only topk relu]

Each cell is one run of SAETrainer at its defaults (k = 32, or an L0 of 32 for the kinds with a penalty), measured on
the cache's held-out sequences, and is written to benchmarks/results/architectures.json when it ends; cells that are
there are not run again (--fresh runs them again). A transcoder predicts the layer's output from its input; attention
stands between them, so it cannot be perfect.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.machine import about
from sae.config import VERSION, SAEConfig
from sae.data.activations import Stream, gather
from sae.data.cache import CacheSource
from sae.kernels import native
from sae.models import KINDS, create_sae
from sae.rundir import git_commit
from sae.schedules import peak_lr
from sae.trainer import SAETrainer

HELD_OUT = 0.15  # of the sequences: a few files of text alone differ in L0 by 5%
RESULTS = Path(__file__).parent / "results" / "architectures.json"
FORMS: dict[str, dict[str, Any]] = {
    "sae": {},
    "transcoder": {"transcode": True},
    "skip": {"transcode": True, "skip_connection": True},
}


def cell(activation: Any, form: str, folder: str, n_tokens: int) -> dict:
    """Train and measure one SAE."""
    source = CacheSource(folder, val_split=HELD_OUT)
    names = list(source.widths)
    hookpoint = next(name for name in names if not name.endswith("@in"))
    c = SAEConfig(
        d_in=source.widths[f"{hookpoint}@in"] if FORMS[form] else source.widths[hookpoint],
        d_out=source.widths[hookpoint],
        activation=activation,
        hook_point=hookpoint,
        **FORMS[form],
    )
    used = names if FORMS[form] else [hookpoint]
    source = CacheSource(folder, hookpoints=used, val_split=HELD_OUT)
    val = gather(source.held_out(), 1 << 20, "validation")
    stream = Stream(source, n_tokens=n_tokens, batch_size=c.batch_size, buffer_tokens=65_536)
    trainer = SAETrainer({hookpoint: create_sae(c)}, c, stream)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    learner = trainer.learners[hookpoint]
    metrics = learner.validate(val)
    return {
        "activation": activation,
        "form": form,
        "explained_variance": metrics["explained_variance"],
        "l0": metrics["l0"],
        "dead_fraction": metrics["dead_fraction"],
        "seconds": seconds,
        "d_sae": learner.sae.d_sae,
        "k": c.k,
        "batch_size": c.batch_size,
        "learning_rate": peak_lr(learner.config),
        "n_tokens": stream.n_tokens,
        "n_held_out": len(val[hookpoint]),
        "commit": git_commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("activations")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--only", nargs="+", default=list(KINDS))
    parser.add_argument("--forms", nargs="+", default=list(FORMS))
    parser.add_argument("--fresh", action="store_true")
    given = parser.parse_args()
    native.keep_memory()
    done = json.loads(RESULTS.read_text())["cells"] if RESULTS.is_file() else []
    for form in given.forms:
        for activation in given.only:
            same = [r for r in done if (r["activation"], r["form"]) == (activation, form)]
            if same and not given.fresh:
                continue
            row = cell(activation, form, given.activations, given.tokens)
            done = [r for r in done if r not in same] + [row]
            RESULTS.parent.mkdir(exist_ok=True)
            RESULTS.write_text(json.dumps({"about": about() | {"nanosae": VERSION}, "cells": done}, indent=1) + "\n")
            print(
                f"{activation:10} {form:10} EV {row['explained_variance']:.4f}  L0 {row['l0']:.2f}  "
                f"dead {100 * row['dead_fraction']:.2f}%  {row['seconds']:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
