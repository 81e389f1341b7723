"""Measure a trained SAE on held-out text:  python -m scripts.sae_eval  (the newest run)"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae import distributed, files, hooks, log, plots
from sae.config import ChatConfig, EvalConfig, TrainConfig, UserError, from_cli
from sae.data.activations import Source, gather
from sae.data.datasets import Dataset, open_dataset
from sae.distributed import ALONE, World
from sae.evaluator import SAEEvaluator, assess, decoder_similarity, evaluate, summary
from sae.formats import store
from sae.hooks import Acts
from sae.lm.language_model import LanguageModel, best_device, load_language_model
from sae.models import SAE


class Opened(NamedTuple):
    """An SAE with the model, hookpoint and text it belongs to, what its cfg.json says of them, its folder, and where
    what is found about it goes."""

    lm: LanguageModel
    sae: SAE
    hookpoint: str
    dataset: Dataset
    trained_on: dict[str, Any]
    folder: Path
    out: Path


def text_of(c: EvalConfig | ChatConfig, trained_on: Mapping[str, Any]) -> str | None:
    """The text that a config names, else the one an SAE was trained on; None is the embedded one."""
    name = trained_on.get("dataset_path")
    return c.dataset if c.dataset is not None else None if name == "embedded" else name


def trained_model(
    c: EvalConfig | ChatConfig, trained_on: Mapping[str, Any], device: torch.device
) -> LanguageModel | None:
    """The model that a config names, else the one an SAE was trained on, in the dtype of then; None if neither says."""
    name = c.model or trained_on.get("model_name")
    dtype = c.model_dtype or trained_on.get("model_dtype", "float32")
    return load_language_model(name, device=device, dataset=text_of(c, trained_on), dtype=dtype) if name else None


def open_sae(c: EvalConfig, lm: LanguageModel | None = None) -> Opened:
    """The SAE a config means and what it belongs to. lm: its model, where that is loaded already."""
    path = Path(c.sae_path) if c.sae_path else store.newest_run("sae_models")
    device = best_device(distributed.local_device(c.device))
    sae = store.load_sae(c.sae_path or path, device=device)
    trained_on = store.load_cfg(c.sae_path or path)
    folder = store.find_sae(c.sae_path or path).parent
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
    dataset = open_dataset(text_of(c, trained_on), **how)
    if "model_name" not in trained_on:
        hookpoint = hooks.resolve(lm.module, hookpoints=[hookpoint])[0]
    return Opened(lm, sae, hookpoint, dataset, trained_on, folder, out)


def measure(c: EvalConfig, opened: Opened, world: World = ALONE) -> None:
    """Write eval.json, final_assessment.json and the plots, and say what stands in them; of a world the first does."""
    lm, sae, hookpoint, dataset, trained_on, folder, out = opened
    report, totals = evaluate(
        lm, sae, hookpoint, dataset, n_tokens=c.eval_tokens, mean_tokens=c.mean_tokens,
        ctx_len=c.ctx_len or trained_on.get("context_size", 256), skip_first=trained_on.get("skip_first", False),
        exclude_tokens=trained_on.get("exclude_tokens", ()), model_batch_size=c.model_batch_size,
        world=world,
    )  # fmt: skip
    if world.everyone.rank > 0:
        return
    files.write_json(report.to_dict(), out / "eval.json")
    pictures = plots.plot_evaluation(totals, out / "plots")
    if (folder / "metrics.jsonl").is_file():
        pictures += plots.plot_training(folder / "metrics.jsonl", out / "plots")
    for line in summary(report):
        log.say(line)
    write_assessment(report.to_dict(), sae, out)
    log.say(f"written to {out / 'eval.json'} and {', '.join(str(p) for p in pictures)}")


def write_assessment(metrics: Mapping[str, Any], sae: SAE, out: Path) -> None:
    """Write final_assessment.json to `out`, and say what stands in it."""
    assessment = assess(metrics, decoder_similarity(sae.W_dec))
    files.write_json(assessment.to_dict(), out / "final_assessment.json")
    for line in assessment.lines():
        log.say(line)


def assess_run(
    c: TrainConfig, folders: Mapping[str, Path], held_out: Source | None, lm: LanguageModel | None = None,
    world: World = ALONE,
) -> None:  # fmt: skip
    """Measure every SAE of a run that has just ended: {hookpoint: folder}. lm: its model, where that is loaded.

    Where the run knows no model, having trained on a file, its held-out activations must do.
    """
    val: Acts = {}
    for hookpoint, folder in folders.items():
        if not store.load_cfg(folder).get("activations_file"):
            device = c.model_device or c.device
            one = EvalConfig(sae_path=str(folder), device=device, model_batch_size=c.model_batch_size)
            opened = open_sae(one, lm)
            lm = opened.lm
            measure(one, opened, world)
        elif held_out is not None and not c.transcode:
            if world.everyone.rank > 0:
                continue
            if not val:
                held_out.rewind()
                val = gather(held_out, c.val_tokens, "the assessment")
            sae = store.load_sae(folder, device=best_device(c.device))
            settings = {"architecture": sae.config.activation, "d_in": sae.d_in, "d_sae": sae.d_sae}
            metrics = SAEEvaluator(sae).evaluate(val[hookpoint.split("/")[0]])
            write_assessment({**metrics, **settings, "hookpoint": hookpoint}, sae, folder)
        else:
            log.say(f"'{hookpoint}' cannot be assessed: the run held nothing out; give --val_split 0.05")


def main(argv: list[str]) -> None:
    c = from_cli(EvalConfig, argv, prog="python -m scripts.sae_eval", description=__doc__ or "")
    opened = open_sae(c)
    everyone = distributed.join(opened.lm.device)
    measure(c, opened, World(everyone, device=opened.lm.device))
    distributed.leave()


if __name__ == "__main__":
    log.run_script(main)
