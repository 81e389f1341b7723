"""Run directories: name them, record settings, refuse to overwrite, resume; open a trained SAE with its model."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae import checkpoint, distributed, files, log
from sae import schedules as sched
from sae.config import VERSION, ChatConfig, EvalConfig, SAEConfig, TrainConfig, UserError, read_json
from sae.data.datasets import Dataset, open_dataset
from sae.distributed import World
from sae.formats import store
from sae.hookpoints import resolve
from sae.lm.language_model import LanguageModel, best_device, load_language_model
from sae.models import SAE

RUN_FILES = """config.json metrics.jsonl checkpoint_step*.pt best_model.pt eval.json final_assessment.json
wandb_run_id""".split()
# What may differ between the two halves of a resumed run.
FREE_SETTINGS = """resume overwrite device model_device save_dir run_name save_every log_every log_to_wandb
wandb_project assess distribute_modules shard_latents plan""".split()

# --------------------------------------------------------------------------------------------------
# names


def run_folder(c: TrainConfig, hookpoints: Sequence[str]) -> Path:
    """sae_models/<run_name>, or layer_10, layer_10_mlp, layers_0_4_8, or the hookpoint asked for."""
    if c.run_name is not None:
        inside = Path(c.run_name)
        if not inside.parts or ".." in inside.parts or inside.is_absolute():
            raise UserError(f"--run_name '{c.run_name}' names no folder inside --save_dir; give a name such as mine")
        return Path(c.save_dir) / inside
    if c.hookpoints or c.activations:
        name = hookpoints[0] if len(hookpoints) == 1 else re.sub(r"[^\w.@-]", "_", (c.hookpoints or hookpoints)[0])
        return Path(c.save_dir) / name
    return Path(c.save_dir) / _layers_name([re.findall(r"\d+", name)[0] for name in hookpoints], c.hook_type)


def _layers_name(layers: Sequence[Any], hook_type: str) -> str:
    name = ("layer_" if len(layers) == 1 else "layers_") + "_".join(map(str, layers))
    return name if hook_type == "resid_post" else f"{name}_{hook_type}"


def claim(c: TrainConfig, hookpoints: Sequence[str]) -> Path:
    """The folder of a run. Raises UserError, now and not after an hour, if the run cannot start or resume in it."""
    folder = run_folder(c, hookpoints)
    if c.resume:
        checkpoint.to_resume_from(folder)
    elif not c.overwrite:
        refuse_existing(folder)
    files.check_writable(Path(c.save_dir), "--save_dir")
    return folder


def run_to_resume(flags: dict[str, Any]) -> Path | None:
    """The config.json of the run that --resume means: of --run_name, of --layer or --layers, or the newest.

    None without --resume, and where only the model could tell the run's name (--hookpoints, --activations).
    """
    if not flags.get("resume"):
        return None
    root = Path(flags.get("save_dir", TrainConfig.save_dir))
    layers = flags.get("layers") or [flags.get("layer")]
    if "run_name" in flags:
        folder = root / str(flags["run_name"])
    elif layers != [None]:
        folder = root / _layers_name(layers, flags.get("hook_type", TrainConfig.hook_type))
    elif flags.keys() & {"hookpoints", "activations", "hook_type", "layer_stride"}:
        return None
    else:
        written = [p for p in root.rglob("checkpoint_step*.pt") if (p.parent / "config.json").is_file()]
        if not written:
            raise UserError(f"there is no run to resume in '{root}'; start one without --resume")
        folder = max(written, key=lambda p: p.stat().st_mtime).parent
    if not (folder / "config.json").is_file():
        return None
    flags |= {"save_dir": str(folder.parent), "run_name": folder.name}
    for layout in ("shard_latents", "distribute_modules"):  # as many processes as there are now
        flags.setdefault(layout, getattr(TrainConfig, layout))
    return folder / "config.json"


# --------------------------------------------------------------------------------------------------
# describe


def begin(save_dir: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Write config.json, in the place of an old run if `overwrite`."""
    if overwrite:
        remove_run(save_dir)
    files.write_json(settings, save_dir / "config.json")


def derived(c: SAEConfig) -> dict[str, Any]:
    """What follows from an SAE's settings, for config.json."""
    rates = {"learning_rate": sched.peak_lr(c), "dead_after_tokens": sched.dead_after_tokens(c)}
    return {**rates, "target_l0": sched.target_l0(c), "d_in": c.d_in, "d_sae": sched.n_latents(c)}


def surroundings(device: torch.device, world: World) -> dict[str, Any]:
    """What a run runs on and with, for config.json."""
    return {
        "versions": {"nanosae": VERSION, "torch": torch.__version__, "python": platform.python_version()},
        "device": str(device),
        "world": dict(zip(("modules", "data", "latents"), world.shape, strict=True)),
        "threads": torch.get_num_threads(),
        "git_commit": git_commit(),
        "argv": sys.argv,
    }


def git_commit() -> str | None:
    """The commit this code is at, or None outside a checkout."""
    command, here = ["git", "rev-parse", "HEAD"], Path(__file__).parent
    try:
        got = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return got.stdout.strip() or None


def write_best(path: Path, sae: SAE, feature_counts: Tensor, about: dict[str, Any]) -> None:
    """best_model.pt, as formats/nanochat.py reads it. about: when it was the best, and by what loss."""
    weights = {**sae.state_dict(), "feature_counts": feature_counts.cpu()}
    if sae.world.latents.size > 1:  # put together on disk, since one process may not hold all
        file = path.with_suffix(".safetensors")
        store.write_shards(weights, sae, file)
        if sae.world.latents.rank > 0:
            return
        weights = files.read_safetensors(file)
        file.unlink()
    counts = weights.pop("feature_counts")
    best = {**about, "sae_state_dict": weights, "config": sae.config.to_dict(), "feature_counts": counts}
    files.write_torch(best, path)


# --------------------------------------------------------------------------------------------------
# refuse


def refuse_existing(save_dir: Path) -> None:
    """Raise UserError if the folder holds a run."""
    saved = checkpoint.checkpoints(save_dir)
    if saved or (save_dir / "config.json").exists() or (save_dir / store.CFG).exists():
        goes_on = saved or any(save_dir.rglob(store.CFG))  # of several SAEs, each in its folder
        then = "give --resume, --overwrite" if goes_on else "it has no checkpoint to resume from yet; give --overwrite"
        raise UserError(
            f"'{save_dir}' holds a run already; {then} or another --run_name (from Python: overwrite=True or another "
            "save_dir)"
        )


def remove_run(save_dir: Path) -> None:
    """Delete a run's own files from its folder and its hookpoints' folders, and nothing else there."""
    settings: Any = read_json(save_dir / "config.json") if (save_dir / "config.json").is_file() else {}
    for key in ("resolved", "hookpoints"):
        settings = settings.get(key, {}) if isinstance(settings, dict) else {}
    names = [name for name in settings if isinstance(name, str)]
    inside = [save_dir / name for name in names if name and not name.startswith("/") and ".." not in name]
    for folder in (save_dir, *inside):
        for pattern in (*RUN_FILES, store.CFG, store.WEIGHTS):
            for old in list(folder.glob(pattern)):
                old.unlink(missing_ok=True)
        for made in ("features", "plots"):
            shutil.rmtree(folder / made, ignore_errors=True)


def refuse_other(
    path: str | Path, state: dict[str, Any], c: SAEConfig, metadata: Mapping[str, Any], names: Sequence[str]
) -> None:
    """Raise UserError unless the checkpoint `state` has this run's settings, data and SAEs."""
    plain = lambda config: json.loads(json.dumps(config))  # tuples are lists, as in config.json
    then, now = plain(state["config"]), plain(c.to_dict())
    for name in sorted(now.keys() - FREE_SETTINGS):
        if then.get(name) != now[name]:
            before = "(none given)" if then.get(name) is None else then[name]
            raise UserError(
                f"'{path}' was trained with {name}={before} and {now[name]} is asked now; use the same settings, or "
                "train on from its weights: --finetune"
            )
    then, now = (m.get("provenance") or {} for m in (state.get("metadata", {}), metadata))
    for key in then.keys() & now.keys():
        if then[key] != now[key]:
            raise UserError(f"'{path}' was trained on other data: {key} has changed since; start a new run")
    if set(state["names"]) != set(names):
        raise UserError(f"'{path}' holds {', '.join(state['names'])}; this run trains {', '.join(names)}")


# --------------------------------------------------------------------------------------------------
# SAEs of earlier runs


def finetuned(c: TrainConfig, saes: dict[str, SAE | None]) -> dict[str, SAE | None]:
    """Fresh SAEs with the weights of --finetune: of one SAE for all, or of a run that has one for each hookpoint."""
    assert c.finetune is not None
    for name, fresh in saes.items():
        if fresh is None:
            continue
        inside = Path(c.finetune) / name
        sae = store.load_sae(inside if inside.is_dir() else c.finetune)
        for what in "activation d_in d_out d_sae transcode skip_connection tied".split():
            got, wanted = getattr(sae.config, what), getattr(fresh.config, what)
            if got != wanted:
                raise UserError(
                    f"the SAE in '{c.finetune}' has {what}={got} and {wanted} is asked for; set --{what} {got}"
                )
        _refuse_other_scale(c, sae, fresh)
        fresh.take_(sae.tensors())
    return saes


def _refuse_other_scale(c: TrainConfig, sae: SAE, fresh: SAE) -> None:
    """Raise UserError if a pretrained SAE's weights would mean something else in a run with these settings."""
    if sae.layer_norm != fresh.layer_norm:
        flag = "--normalize_activations layer_norm" if sae.layer_norm else "another --normalize_activations"
        what = "reads activations after layer norm" if sae.layer_norm else "reads activations without layer norm"
        raise UserError(f"the SAE in '{c.finetune}' {what}; give {flag}")
    norms = sae.W_dec.detach().norm(dim=1)
    unit = norms.median() if c.transcode else 1.0  # a transcoder's unit may be that of other activations
    if fresh.unit_decoder and ((norms - unit).abs() > 1e-3 * unit).any():
        raise UserError(
            f"the SAE in '{c.finetune}' has decoder rows of norms {norms.min():.3g} to {norms.max():.3g}, which would "
            "be made 1; give --no-normalize_decoder"
        )


class Opened(NamedTuple):
    """An SAE with the model, hookpoint and text it belongs to, its cfg.json's metadata, its folder, and the folder for
    what is found about it."""

    lm: LanguageModel
    sae: SAE
    hookpoint: str
    dataset: Dataset
    trained_on: dict[str, Any]
    folder: Path
    out: Path

    @property
    def reading(self) -> dict[str, Any]:
        """How the text was cut in training, and which tokens did not count."""
        how: dict[str, Any] = {"ctx_len": self.trained_on.get("context_size", 256)}
        return how | {name: x for name, x in self.trained_on.items() if name in ("skip_first", "exclude_tokens")}


def trained_model(
    c: EvalConfig | ChatConfig, trained_on: Mapping[str, Any], device: torch.device
) -> LanguageModel | None:
    """The model that a config names, else the one an SAE was trained on, in that run's dtype; None if neither says."""
    name = c.model or trained_on.get("model_name")
    dtype = c.model_dtype or trained_on.get("model_dtype", "float32")
    return load_language_model(name, device=device, dataset=_text_of(c, trained_on), dtype=dtype) if name else None


def _text_of(c: EvalConfig | ChatConfig, trained_on: Mapping[str, Any]) -> str | None:
    """The text that a config names, else the one an SAE was trained on; None is the embedded one."""
    name = trained_on.get("dataset_path")
    return c.dataset if c.dataset is not None else None if name == "embedded" else name


def open_sae(c: EvalConfig, lm: LanguageModel | None = None) -> Opened:
    """The SAE a config means and what it belongs to. lm: its model, where that is loaded already."""
    path = c.sae_path or store.newest_run("sae_models")
    device = best_device(distributed.local_device(c.device))
    sae, trained_on, folder = store.load_sae(path, device=device), store.load_cfg(path), store.find_sae(path).parent
    log.say(f"SAE: {c.sae_path or folder}")
    out = Path(c.output_dir) if c.output_dir else folder
    files.check_writable(out, "--output_dir")
    hookpoint = trained_on.get("hookpoint")
    if not hookpoint:
        raise UserError(f"'{path}' does not say which hookpoint it belongs to; its cfg.json needs metadata.hookpoint")
    lm = lm or trained_model(c, trained_on, device)
    if lm is None:
        origin = trained_on.get("activations_file", "activations")
        raise UserError(
            f"'{path}' was trained on '{origin}', which names no model; give --model and --dataset, and train with "
            f"--hook_point if '{hookpoint}' is not the module in it that the activations come from"
        )
    # how its own text was read says nothing about another
    how = {k: trained_on[k] for k in ("text_column", "split", "streaming") if k in trained_on and not c.dataset}
    dataset = open_dataset(_text_of(c, trained_on), **how)
    if "model_name" not in trained_on:
        hookpoint = resolve(lm.module, hookpoints=[hookpoint])[0]
    return Opened(lm, sae, hookpoint, dataset, trained_on, folder, out)
