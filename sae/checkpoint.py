"""Checkpoints of a run: each process writes its part, any number of processes can read them.

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
from sae.metrics import Window

KEPT = 2
# Goes up when the contents change. 3: the learner's tensors in one flat dict, W_enc (D, F) in place of encoder (F, D).
FORMAT, OLDER = 4, 3


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
    if state.get("format") not in (OLDER, FORMAT):
        raise UserError(
            f"'{path}' was written by another version of nanoSAE; go on with that, or start without --resume"
        )
    parts = [] if "parts" in state else [state]
    for name, size in state.get("parts", ()):
        part = Path(path).with_name(Path(name).name)
        if not part.is_file() or part.stat().st_size != size:
            raise UserError(f"'{part}' is missing or cut short; use an older checkpoint")
        parts.append(files.read_torch(part, mmap=True))  # a process needs little of it
    if state["format"] == OLDER:
        parts = [{**part, "saes": {name: _from_older(one) for name, one in part["saes"].items()}} for part in parts]
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
    """The state_dict of the learner `name` for the latents `own`, out of the parts of any number of shards.

    A tensor has latents along its first axis, unless it has no axis or a name on the way to it is one of WHOLE.
    """
    found = [(range(*p["own"][name]), p["saes"][name]) for p in parts if name in p["saes"]]
    if len(found) == 1 and found[0][0] == own:
        return found[0][1]
    found = sorted(((r, s) for r, s in found if r.start < own.stop and own.start < r.stop), key=lambda f: f[0].start)
    cuts = [slice(max(own.start, r.start) - r.start, min(own.stop, r.stop) - r.start) for r, _ in found]

    def join(values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, dict):
            return {k: first[k] if k in WHOLE else join([value[k] for value in values]) for k in first}
        if isinstance(first, list):
            return [join(items) for items in zip(*values, strict=True)]
        if isinstance(first, Tensor) and first.ndim:
            return torch.cat([value[cut] for value, cut in zip(values, cuts, strict=True)])
        return first

    return join([state for _, state in found])


WHOLE = (*SHARED, *Window.WHOLE, "groups")


def _from_older(state: dict[str, Any]) -> dict[str, Any]:
    """A learner's state as FORMAT has it, from the one of OLDER."""
    turned = lambda tensors: {n.replace("W_enc", "encoder"): x.t() if n == "W_enc" else x for n, x in tensors.items()}
    flip = lambda name, x: x.t() if name == "W_enc" and isinstance(x, Tensor) and x.ndim == 2 else x
    parts = []
    for names, part in zip(state["optimizer_names"], state["optimizer_state_dict"], strict=True):
        moments = {
            names[i].replace("W_enc", "encoder"): {key: flip(names[i], x) for key, x in one.items()}
            for i, one in part["state"].items()
        }
        parts.append({"state": moments, "groups": part["param_groups"]})
    totals = dict(state["totals"])
    fired = totals.pop("fired")
    average = {"average": turned(state["average"]), "n_averaged": state["n_updates"]}
    kept = "scaler n_dead residual log_weight drift n_updates scale scale_out variance best_val_loss".split()
    return {
        **{name: state[name] for name in kept},
        "sae": turned(state["sae_state_dict"]),
        "optimizer": {"parts": parts, **average},
        "firing": {name: state[name] for name in ("tokens_since_fired", "feature_counts", "rate", "listed")},
        "window": {"totals": totals, "fired": fired, "sums": state["sums"], "n_steps": state["n_sums"]},
    }
