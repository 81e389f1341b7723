"""Write activations to disk, to train on them many times:  python -m scripts.sae_collect --layer 10"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae import log
from sae.config import CollectConfig, UserError, from_cli


def main(argv: list[str]) -> None:
    c = from_cli(CollectConfig, argv, prog="python -m scripts.sae_collect", description=__doc__)
    from sae.data import cache
    from sae.data.activations import ModelSource
    from sae.data.datasets import open_dataset
    from sae.data.tokens import TokenRows
    from sae.hookpoints import choose, input_of, split
    from sae.lm.language_model import best_device, load_language_model

    folder = Path(c.output_dir)
    if folder.exists() and not c.overwrite:
        raise UserError(f"'{folder}' exists; choose another --output_dir or give --overwrite")
    lm = load_language_model(c.model, device=best_device(c.device), dataset=c.dataset, dtype=c.model_dtype)
    hookpoints = choose(c, lm.module)
    if c.transcode:  # the input and the output of each module
        pairs = [(module, input_of(module)) for module, _ in map(split, hookpoints)]
        hookpoints = list(dict.fromkeys(name for pair in pairs for name in pair))
    dataset = open_dataset(c.dataset, text_column=c.text_column, split=c.split, streaming=c.streaming)
    left_out: Any = {"skip_first": c.skip_first, "exclude_tokens": c.exclude_tokens}
    rows = TokenRows(lm, dataset, "train", c.ctx_len, **left_out, n_threads=c.data_preprocessing_num_proc)
    source = ModelSource(rows, hookpoints, model_batch_size=c.model_batch_size)
    how: Any = {"dtype": c.storage_dtype, "shard_tokens": c.shard_tokens, "overwrite": c.overwrite}
    manifest = cache.write_cache(folder, source, n_tokens=c.max_tokens, **how)
    log.say(f"{manifest['n_tokens']:,} tokens of {', '.join(hookpoints)} in {folder}")
    log.say(f"next: python -m scripts.sae_train --activations {folder}")


if __name__ == "__main__":
    log.run_script(main)
