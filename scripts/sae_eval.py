"""Measure a trained SAE on held-out text:  python -m scripts.sae_eval  (the newest run)"""

from __future__ import annotations

from pathlib import Path

from sae import formats, log, plots
from sae.config import EvalConfig, UserError, from_cli
from sae.evaluator import evaluate, summary
from sae.language_model import LanguageModel, best_device, load_language_model
from sae.models import SAE
from sae.tokens import Dataset, open_dataset


def open_sae(c: EvalConfig) -> tuple[LanguageModel, SAE, str, Dataset, dict, Path]:
    """The SAE a config means, with the model, hookpoint and text it belongs to, and its folder."""
    path = Path(c.sae_path) if c.sae_path else formats.newest_run("sae_models")
    device = best_device(c.device)
    sae = formats.load_sae(c.sae_path or path, device=device)
    trained_on = formats.load_cfg(c.sae_path or path)
    folder = formats.find_sae(c.sae_path or path).parent
    hookpoint = trained_on.get("hookpoint")
    if not hookpoint:
        raise UserError(f"'{path}' does not say which hookpoint it belongs to; its cfg.json needs metadata.hookpoint")
    name = trained_on.get("dataset_path")
    dataset_name = c.dataset if c.dataset is not None else None if name == "embedded" else name
    lm = load_language_model(c.model or trained_on.get("model_name", "pygpt"), device=device, dataset=dataset_name)
    dataset = open_dataset(dataset_name, text_column=trained_on.get("text_column", "text"))
    return lm, sae, hookpoint, dataset, trained_on, folder


def main(argv: list[str]) -> None:
    c = from_cli(EvalConfig, argv, prog="python -m scripts.sae_eval", description=__doc__)
    lm, sae, hookpoint, dataset, trained_on, folder = open_sae(c)
    out = Path(c.output_dir) if c.output_dir else folder
    report, totals = evaluate(
        lm, sae, hookpoint, dataset, n_tokens=c.eval_tokens, mean_tokens=c.mean_tokens,
        ctx_len=c.ctx_len or trained_on.get("context_size", 256), skip_first=trained_on.get("skip_first", False),
        model_batch_size=c.model_batch_size,
    )  # fmt: skip
    formats.write_json(report.to_dict(), out / "eval.json")
    pictures = plots.plot_evaluation(totals, out / "plots")
    if (folder / "metrics.jsonl").is_file():
        pictures += plots.plot_training(folder / "metrics.jsonl", out / "plots")
    for line in summary(report):
        log.say(line)
    log.say(f"written to {out / 'eval.json'} and {', '.join(str(p) for p in pictures)}")


if __name__ == "__main__":
    log.run_script(main)
