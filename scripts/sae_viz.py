"""Pages about a trained SAE's features, from held-out text:  python -m scripts.sae_viz  (the newest run)"""

from __future__ import annotations

from sae import log
from sae.config import VizConfig, from_cli


def main(argv: list[str]) -> None:
    c = from_cli(VizConfig, argv, prog="python -m scripts.sae_viz", description=__doc__)
    from sae import distributed
    from sae.feature_viz import FeatureVisualizer
    from sae.pages.explainer import Endpoint, Explainer
    from sae.pages.labels import distribution
    from sae.plots import plot_evaluation, plot_training
    from sae.rundir import open_sae

    opened = open_sae(c)
    lm, sae, hookpoint, dataset, _, folder, out = opened
    axis = distributed.join(lm.device)
    viz = FeatureVisualizer(sae, c, lm=lm, hookpoint=hookpoint, dataset=dataset, axis=axis, **opened.reading)
    totals = viz.tables.totals
    distributed.leave()
    if axis.rank > 0:  # one process does the rest
        return
    if c.explainer_url and c.explainer_model:
        journal = out / f"explanations_{viz.identity()[:12]}.jsonl"
        explainer = Explainer(Endpoint(c.explainer_url, c.explainer_model), journal)
        cost = explainer.estimate(*viz.to_explain)
        log.say(
            f"asking {c.explainer_model} {cost['questions']:,} questions: about {cost['tokens_in']:,} tokens to read "
            f"and at most {cost['tokens_out']:,} to write; answers are kept in {journal}"
        )
        viz.explain(explainer)
    index = viz.save(out / "features")
    plot_evaluation(totals, out / "plots")
    if (folder / "metrics.jsonl").is_file():
        plot_training(folder / "metrics.jsonl", out / "plots")
    log.say(f"{len(viz.chosen)} of {sae.d_sae} features, from {totals.n:,} tokens; plots in {out / 'plots'}")
    live = set(viz.tables.live())
    if c.labels and live:
        for line in distribution([label for i, label in zip(viz.tables.latents, viz.labels, strict=True) if i in live]):
            log.say(line)
    log.say(f"open {index}")


if __name__ == "__main__":
    log.run_script(main)
