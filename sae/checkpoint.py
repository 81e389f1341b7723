"""Checkpoints of a run: written by the processes that hold the pieces, read by any other number of them.

checkpoint_step{N}.pt alone where there was one process. Of several it is what all know and the list of the parts,
checkpoint_step{N}.part{i}of{n}.pt, and is written last: without it there is no checkpoint.
(torch.distributed.checkpoint is not used since its index is a pickle that must be trusted.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae import files, log
from sae.base import SHARED
from sae.config import UserError
from sae.distributed import Axis

KEPT = 2
FORMAT = 3  # goes up when what a run must know to go on changes


def checkpoints(save_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [p for p in save_dir.glob("checkpoint_step*.pt") if p.stem[len("checkpoint_step") :].isdigit()]
    return sorted(found, key=lambda p: int(p.stem[len("checkpoint_step") :]))


def write(path: Path, state: dict[str, Any], part: dict[str, Any], everyone: Axis) -> None:
    """Write what all know and what each process holds, then drop all but the newest checkpoints."""
    state = {**state, "format": FORMAT}
    if everyone.size == 1:
        files.write_torch({**state, **part}, path)
    else:
        own = path.with_name(f"{path.stem}.part{everyone.rank + 1}of{everyone.size}.pt")
        files.write_torch(part, own)
        parts = everyone.objects((own.name, own.stat().st_size))
        if everyone.rank == 0:
            files.write_torch({**state, "parts": [list(p) for p in parts]}, path)
        everyone.barrier()
    if everyone.rank == 0:
        for old in checkpoints(path.parent)[:-KEPT]:
            old.unlink(missing_ok=True)
        for one in path.parent.glob("checkpoint_step*.part*.pt"):
            if not one.with_name(f"{one.name.split('.')[0]}.pt").exists():
                one.unlink(missing_ok=True)


def read(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What all know, and the parts. Raises UserError if the file or one of them is missing, damaged or foreign."""
    state = files.read_torch(path, mmap=True)
    if not isinstance(state, dict) or not {"step", "stream", "config", "names"} <= state.keys():
        raise UserError(f"'{path}' is no training checkpoint; give a checkpoint_step*.pt")
    if state.get("format") != FORMAT:
        raise UserError(
            f"'{path}' was written by another version of nanoSAE; go on with that, or start without --resume"
        )
    if "parts" not in state:
        return state, [state]
    parts = []
    for name, size in state["parts"]:
        part = Path(path).with_name(Path(name).name)
        if not part.is_file() or part.stat().st_size != size:
            raise UserError(f"'{part}' is missing or cut short; use an older checkpoint")
        parts.append(files.read_torch(part, mmap=True))  # a process needs little of it
    return state, parts


def to_resume_from(save_dir: Path | None) -> list[Path]:
    """The checkpoints of a run, oldest first. Raises UserError if there are none."""
    found = checkpoints(save_dir) if save_dir else []
    if not found:
        raise UserError(
            f"'{save_dir}' holds no checkpoint to resume from; start without --resume (--overwrite, if it holds a run)"
        )
    return found


def newest_whole(save_dir: Path | None) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """The newest checkpoint that can be read, and what it holds. Raises UserError if there is none."""
    found = to_resume_from(save_dir)
    for path in reversed(found):
        try:
            return path, *read(path)
        except UserError as e:
            if path == found[0]:
                raise
            log.say(f"{e}; going back to the one before")
    raise AssertionError("checkpoints() gave none")


def joined(parts: Sequence[dict[str, Any]], name: str, own: range) -> dict[str, Any]:
    """The state_dict of the learner `name` for the latents `own`, out of the parts of any number of shards."""
    found = [(range(*p["own"][name]), p["saes"][name]) for p in parts if name in p["saes"]]
    if len(found) == 1 and found[0][0] == own:
        return found[0][1]
    found = sorted(((r, s) for r, s in found if r.start < own.stop and own.start < r.stop), key=lambda f: f[0].start)
    pieces = [(slice(max(own.start, r.start) - r.start, min(own.stop, r.stop) - r.start), s) for r, s in found]

    def join(tensor: str, *path: Any) -> Tensor:
        values = []
        for cut, value in pieces:
            for key in path:
                value = value[key]
            if tensor in SHARED or value.ndim == 0:
                return value
            values.append((value.t() if tensor == "W_enc" else value)[cut])  # W_enc lies transposed in memory
        return torch.cat(values).t() if tensor == "W_enc" else torch.cat(values)

    first = found[0][1]
    state = {**first, "totals": {**first["totals"], "fired": join("", "totals", "fired")}}
    for counts in ("tokens_since_fired", "feature_counts", "rate", "listed"):
        state[counts] = join("", counts)
    for group in ("sae_state_dict", "average"):
        state[group] = {tensor: join(tensor, group, tensor) for tensor in first[group]}
    state["optimizer_state_dict"] = []
    for i, (names, optimizer) in enumerate(zip(first["optimizer_names"], first["optimizer_state_dict"], strict=True)):
        at = ("optimizer_state_dict", i, "state")
        moments = {
            j: {k: join(names[j], *at, j, k) if isinstance(v, Tensor) else v for k, v in of_one.items()}
            for j, of_one in optimizer["state"].items()
        }
        state["optimizer_state_dict"].append({**optimizer, "state": moments})
    return state
