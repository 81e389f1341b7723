"""Measure a trained SAE on held-out text:  python -m scripts.sae_eval  (the newest run)"""

from __future__ import annotations

from sae import log
from sae.config import EvalConfig, from_cli


def main(argv: list[str]) -> None:
    c = from_cli(EvalConfig, argv, prog="python -m scripts.sae_eval", description=__doc__)
    from sae import distributed
    from sae.distributed import World
    from sae.evaluator import measure
    from sae.rundir import open_sae

    opened = open_sae(c)
    everyone = distributed.join(opened.lm.device)
    measure(c, opened, World(everyone, device=opened.lm.device))
    distributed.leave()


if __name__ == "__main__":
    log.run_script(main)
