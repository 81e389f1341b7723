"""What looking at every feature costs:  python -m benchmarks.bench_viz [--sae_path sae_models/layer_10] [--parts ...]

cost     sae_viz --all_features over 1M tokens of the training text against a plain forward over the same tokens:
         each batch goes through the whole model, logits included, and then through the pass, so that noise of the
         machine falls on both alike. The pass's time is all else: reading the text, the forward up to the hookpoint,
         the SAE, tables, labels, map, files.
memory   the peak of a process that does the same with a random SAE of 32,768 latents over 131k tokens
peers    SAEDashboard on the same SAE, tokens and features, in an environment of its own (viz_peer.py)

Writes benchmarks/results/bench_viz.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import about
from sae.config import SAEConfig, VizConfig
from sae.data.datasets import open_dataset
from sae.data.tokens import TokenRows, kept_positions
from sae.feature_viz import FeatureVisualizer
from sae.formats import store
from sae.kernels import native
from sae.lm.language_model import LanguageModel, load_language_model
from sae.models import SAE, create_sae
from sae.pages.labels import distribution

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "bench_viz.json"
HOOKPOINT = "transformer.h.10"


class Clock:
    """Wall and processor seconds of what it is wrapped around."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __call__(self, f: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        found = f()
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        return found


@dataclasses.dataclass
class Compared(LanguageModel):
    """A model that, whenever it is read up to a hookpoint, first runs as a whole on the same tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.plain, self.partial = Clock(), Clock()

    def hidden(self, ids: Tensor, valid: Tensor, hookpoints: Any) -> dict[str, Tensor]:
        if len(ids) > 1:  # not where a width is asked for
            self.plain(lambda: self.logits(ids, valid))
        return self.partial(lambda: super(Compared, self).hidden(ids, valid, hookpoints))


def visualizer(lm: LanguageModel, sae: SAE, n_tokens: int) -> FeatureVisualizer:
    config = VizConfig(eval_tokens=n_tokens, all_features=True, train_text=True)
    return FeatureVisualizer(sae, config, lm=lm, hookpoint=HOOKPOINT)


def cost(sae_path: str, n_tokens: int) -> dict[str, Any]:
    lm = load_language_model("pygpt", device="cpu")
    lm = Compared(**{f.name: getattr(lm, f.name) for f in dataclasses.fields(lm)})
    sae = store.load_sae(sae_path)
    _ = visualizer(lm, sae, 4096).tables  # compiles, warms up
    lm.plain, lm.partial = Clock(), Clock()
    viz, whole, reading = visualizer(lm, sae, n_tokens), Clock(), Clock()
    with tempfile.TemporaryDirectory() as tmp:
        whole(lambda: (reading(lambda: viz.tables), viz.save(Path(tmp) / "features")))
        size = sum(p.stat().st_size for p in Path(tmp).rglob("*") if p.is_file())
    row: dict[str, Any] = {"tokens": viz.tables.totals.n, "features": len(viz.chosen), "megabytes": round(size / 1e6)}
    for kind in ("wall", "cpu"):
        plain, partial, read, total = (getattr(c, kind) for c in (lm.plain, lm.partial, reading, whole))
        row |= {
            f"{kind}_forward": plain,
            f"{kind}_viz": total - plain,
            f"{kind}_ratio": (total - plain) / plain,
            f"{kind}_to_hookpoint": partial,
            f"{kind}_tables": read - plain - partial,
            f"{kind}_pages": total - read,
        }
    live = set(viz.tables.live())
    labels = [label for i, label in zip(viz.tables.latents, viz.labels, strict=True) if i in live]
    least = np.array([min(label.precision, label.recall) if label else 0.0 for label in labels])
    row["labels"] = {
        "live": len(labels),
        "good": int((least >= 0.5).sum()),
        "deciles": np.percentile(least, range(0, 101, 10)).round(3).tolist(),
    }
    print("\n".join(distribution(labels)))
    return row


def memory(n_latents: int, n_tokens: int) -> dict[str, Any]:
    """In a process of its own, which counts the peak of all that it ever held."""
    code = f"from benchmarks import bench_viz; bench_viz.fill({n_latents}, {n_tokens})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def fill(n_latents: int, n_tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sae = create_sae(SAEConfig(d_in=192, d_sae=n_latents, k=32), generator=generator).eval()
    lm, start = load_language_model("pygpt", device="cpu"), time.perf_counter()
    viz = visualizer(lm, sae, n_tokens)
    with tempfile.TemporaryDirectory() as tmp:
        viz.save(Path(tmp) / "features")
        size = sum(p.stat().st_size for p in Path(tmp).rglob("*") if p.is_file())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    row = {"latents": n_latents, "live": len(viz.tables.live()), "tokens": viz.tables.totals.n, "peak_bytes": peak}
    print(json.dumps({**row, "megabytes": round(size / 1e6), "seconds": time.perf_counter() - start}))


def peers(sae_path: str, python: str, n_features: int = 512, n_sequences: int = 96) -> dict[str, Any]:
    """The same SAE, tokens and features; ours without labels, which the other does not make."""
    lm, sae = load_language_model("pygpt", device="cpu"), store.load_sae(sae_path)
    ids, *_ = TokenRows(lm, open_dataset(), "val", 256).take(n_sequences)
    keep = kept_positions(lm, ids, torch.ones_like(ids, dtype=torch.bool))
    config = VizConfig(eval_tokens=int(keep.sum()), feature=tuple(range(n_features)), labels=False)
    visualizer = lambda: FeatureVisualizer(sae, config, lm=lm, hookpoint=HOOKPOINT)
    assert visualizer().tables.totals.n == int(keep.sum())  # and warms up
    ours = Clock()
    records = ours(lambda: list(visualizer().each()))
    with tempfile.TemporaryDirectory() as tmp:
        np.save(Path(tmp) / "tokens.npy", ids.numpy())
        job = {
            "tokens": f"{tmp}/tokens.npy",
            "model": str(ROOT / "assets" / "pygpt" / "ckpt.pt"),
            "sae": str(sae_path),
            "hook": "blocks.10.hook_resid_post",
            "features": n_features,
            "ignore": sorted(lm.tokenizer.special_ids),
        }
        (Path(tmp) / "job.json").write_text(json.dumps(job))
        command = [python, str(ROOT / "benchmarks" / "viz_peer.py"), f"{tmp}/job.json"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    theirs = json.loads(done.stdout.strip().splitlines()[-1])
    token = lm.tokenizer.token_str
    same = {"contexts": 0, "logits": 0}
    total = dict(same)
    for r in records:
        their = theirs["features"][str(r.latent)]
        mine = {c.sequence: c.position for c in r.strongest}
        least = r.strongest[-1].values[r.strongest[-1].peak] if len(r.strongest) == config.top_k else 0.0
        seen: set[int] = set()
        for sequence, position, value in their["places"]:
            # their first of each sequence; they take several of one, and none of a sequence's first 6 and last 5
            # tokens, so that some of ours are none of theirs, and some of theirs lie behind our twentieth
            if value <= 0 or sequence in seen or not 6 <= mine.get(sequence, 6) < ids.shape[1] - 5:
                continue
            seen.add(sequence)
            total["contexts"] += 1
            same["contexts"] += mine.get(sequence) == position or (sequence not in mine and value <= least * 1.0001)
        for mine_, their_ in ((r.promoted, their["promoted"]), (r.suppressed, their["suppressed"])):
            total["logits"] += 10
            same["logits"] += len({t for t, _ in mine_} & {token(i) for i in their_[:10]})
    return {
        "peer": f"SAEDashboard {theirs['version']}",
        "tokens": ids.numel(),
        "features": n_features,
        "ours_wall": ours.wall,
        "ours_cpu": ours.cpu,
        "theirs_wall": theirs["seconds"],
        "theirs_cpu": theirs["cpu"],
        "ratio_wall": theirs["seconds"] / ours.wall,
        "ratio_cpu": theirs["cpu"] / ours.cpu,
        "same_contexts": same["contexts"] / max(1, total["contexts"]),
        "contexts_compared": total["contexts"],
        "same_logits": same["logits"] / max(1, total["logits"]),
        "logits_compared": total["logits"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae_path", default="sae_models/layer_10")
    parser.add_argument("--parts", nargs="+", default=["cost", "memory"], choices=["cost", "memory", "peers"])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--latents", type=int, default=32_768)
    parser.add_argument("--memory_tokens", type=int, default=131_072)
    parser.add_argument("--peers_python", default=sys.executable)
    given = parser.parse_args()
    native.keep_memory()
    jobs: dict[str, Callable[[], dict[str, Any]]] = {
        "cost": lambda: cost(given.sae_path, given.tokens),
        "memory": lambda: memory(given.latents, given.memory_tokens),
        "peers": lambda: peers(given.sae_path, given.peers_python),
    }
    for part in given.parts:
        found = {**jobs[part](), "about": about() | {"kernels": native.status()}}
        results = {**(json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}), part: found}
        print(part, json.dumps(results[part], indent=1))
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
