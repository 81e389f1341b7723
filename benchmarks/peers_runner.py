"""Train one SAE with one library's own training code, for benchmarks/peers.py, which starts this file.

    python benchmarks/peers_runner.py JOB.json

Each library runs in its own process and may live in its own environment, so this file needs only torch, numpy and
safetensors, imports a library where it is used, and hands over files: weights.safetensors (the tensors as the library
itself names and saves them) and run.json (settings as they were used, versions, seconds of the training call alone).

All get the same rows. Peers are handed them in one random order, drawn from the seed, and nanoSAE draws its own. What a
library counts in steps or tokens of a far longer run is told at each function.

Letters: B tokens in a batch, D width, F latents.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SEQUENCE = 256  # tokens per sequence, where a library counts its batch in sequences


class Trained(NamedTuple):
    """What a library made: its tensors, how it was set, and the time its training call took."""

    tensors: dict[str, Tensor]
    settings: dict[str, Any]
    seconds: float
    cpu_seconds: float


class Clock:
    """Wall and processor seconds since it was made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self.wall, time.process_time() - self.cpu


def read(folder: Path, first: int, stop: int, *, numbers: bool = False) -> np.ndarray:
    """Rows first..stop of collected activations (sae_collect's format, one hookpoint, float32), (n, D); or the numbers
    of the sequences they are from, (n, 1)."""
    manifest = json.loads((folder / "manifest.json").read_text())
    (hook,) = manifest["hookpoints"].values()
    if manifest["dtype"] != "float32" or stop > manifest["n_tokens"]:
        sys.exit(f"{folder} holds {manifest['n_tokens']} rows of {manifest['dtype']}; {stop} of float32 were wanted")
    file, dtype, width = ("seq", np.int64, 1) if numbers else (hook["file"], np.float32, hook["d_in"])
    parts, start = [], 0
    for shard, n in enumerate(manifest["shards"]):
        a, b = max(first, start), min(stop, start + n)
        if a < b:
            rows = np.memmap(folder / f"{shard:05d}_{file}.bin", dtype, "r", shape=(n, width))
            parts.append(rows[a - start : b - start])
        start += n
    return np.concatenate(parts)


def shuffled(x: Tensor, seed: int) -> Tensor:
    """The rows in the order of a seed."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]


def batches(x: Tensor, size: int) -> Iterator[Tensor]:
    """Whole batches, once through."""
    yield from x[: len(x) // size * size].split(size)


# --------------------------------------------------------------------------------------------------
# the libraries. matched: None for a library's own defaults, else what nanoSAE resolved its own to, for every setting
# that both have (peers.py: `matched`).


def train_nanosae(x: Tensor, job: dict[str, Any], matched: dict[str, Any] | None) -> Trained:
    """train_sae_from_activations as it comes."""
    from sae import SAEConfig, train_sae_from_activations
    from sae.schedules import dead_after_tokens, peak_lr, warmup_steps

    assert matched is None
    config = SAEConfig(d_in=x.shape[1], d_sae=job["d_sae"], k=job["k"], seed=job["seed"])
    clock = Clock()
    sae, trainer = train_sae_from_activations(x, config, val_split=0.0)
    times = clock.read()
    n_steps = trainer.stream.n_batches
    settings = {
        "optimizer": "adam",
        "lr": peak_lr(config),
        "batch": config.batch_size,
        "steps": n_steps,
        "warmup_steps": warmup_steps(config, n_steps),
        "decay_steps": round(config.decay_fraction * n_steps),
        "auxk": config.auxk_alpha,
        "dead_after_tokens": dead_after_tokens(config),
    }
    tensors = {name: getattr(sae, name).detach() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    return Trained(tensors, settings, *times)


def train_sae_lens(x: Tensor, job: dict[str, Any], matched: dict[str, Any] | None) -> Trained:
    """SAETrainer on TopKTrainingSAE, configured through LanguageModelSAERunnerConfig, whose defaults are the library's.

    A latent is dead after 1000 steps (4M tokens), so at its defaults AuxK never begins here. It is left so.
    """
    from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    own: dict[str, Any] = {}
    if matched is not None:
        own = {
            "lr": matched["lr"],
            "train_batch_size_tokens": matched["batch"],
            "lr_warm_up_steps": matched["warmup_steps"],
            "lr_decay_steps": matched["decay_steps"],
            "dead_feature_window": round(matched["dead_after_tokens"] / matched["batch"]),
        }
    sae_config = TopKTrainingSAEConfig(d_in=x.shape[1], d_sae=job["d_sae"], k=job["k"], device="cpu")
    config: Any = LanguageModelSAERunnerConfig(
        sae=sae_config,
        device="cpu",
        seed=job["seed"],
        checkpoint_path=None,
        output_path=None,
        verbose=False,
        logger=LoggingConfig(log_to_wandb=False),
        **own,
    )
    batch = config.train_batch_size_tokens
    config.training_tokens = len(x) // batch * batch
    torch.manual_seed(job["seed"])
    sae = TopKTrainingSAE(sae_config)
    trainer: Any = SAETrainer(config.to_sae_trainer_config(), sae, batches(x, batch))
    clock = Clock()
    trainer.fit()
    times = clock.read()
    with tempfile.TemporaryDirectory() as tmp:
        weights, _ = sae.save_inference_model(tmp)
        tensors = load_file(weights)
    settings = {
        "optimizer": "adam",
        "lr": config.lr,
        "batch": batch,
        "steps": trainer.n_training_steps,
        "warmup_steps": config.lr_warm_up_steps,
        "decay_steps": config.lr_decay_steps,
        "auxk": sae_config.aux_loss_coefficient,
        "dead_after_tokens": config.dead_feature_window * batch,
        "rescale_acts_by_decoder_norm": sae_config.rescale_acts_by_decoder_norm,
    }
    return Trained(tensors, settings, *times)


def train_dictionary_learning(x: Tensor, job: dict[str, Any], matched: dict[str, Any] | None) -> Trained:
    """trainSAE with TopKTrainer on AutoEncoderTopK; the default batch is its ActivationBuffer's 8192.

    Its warm-up of 1000 steps is longer than the run, which it refuses: that becomes 5% of the steps. A latent is dead
    after 10M tokens, a constant in its code, so at its defaults AuxK never begins here; matched sets the attribute.
    """
    from dictionary_learning.trainers.top_k import TopKTrainer
    from dictionary_learning.training import trainSAE

    batch = matched["batch"] if matched is not None else 8192
    steps = len(x) // batch
    made: list[Any] = []

    class Trainer(TopKTrainer):
        """Its trainer, within reach."""

        def __init__(self, **given: Any):
            super().__init__(**given)
            if matched is not None:
                self.dead_feature_threshold = matched["dead_after_tokens"]
            made.append(self)

    config: dict[str, Any] = {
        "trainer": Trainer,
        "steps": steps,
        "activation_dim": x.shape[1],
        "dict_size": job["d_sae"],
        "k": job["k"],
        "layer": 0,
        "lm_name": "rows",
        "seed": job["seed"],
        "device": "cpu",
        "warmup_steps": max(1, steps // 20),
    }
    if matched is not None:
        config |= {
            "lr": matched["lr"],
            "auxk_alpha": matched["auxk"],
            "warmup_steps": matched["warmup_steps"],
            "decay_start": steps - matched["decay_steps"],
        }
    with tempfile.TemporaryDirectory() as tmp:
        clock = Clock()
        trainSAE(batches(x, batch), [config], steps, save_dir=tmp, device="cpu")
        times = clock.read()
        tensors = torch.load(Path(tmp) / "trainer_0" / "ae.pt", weights_only=True)
    trainer = made[0]
    settings = {
        "optimizer": "adam",
        "lr": trainer.lr,
        "batch": batch,
        "steps": steps,
        "warmup_steps": trainer.warmup_steps,
        "decay_steps": 0 if trainer.decay_start is None else steps - trainer.decay_start,
        "auxk": trainer.auxk_alpha,
        "dead_after_tokens": trainer.dead_feature_threshold,
    }
    return Trained(tensors, settings, *times)


class Rows(nn.Module):
    """A stand-in for a language model whose one layer gives row i for token i."""

    def __init__(self, x: Tensor):
        super().__init__()
        self.rows = nn.Embedding.from_pretrained(x)
        self.base_model, self.device = self, torch.device("cpu")
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.rows(input_ids)


def train_sparsify(x: Tensor, job: dict[str, Any], matched: dict[str, Any] | None) -> Trained:
    """Its Trainer itself, on a stand-in model that looks the rows up, in sequences of 256 as the rows were made.

    So its default batch of 32 sequences is 8192 tokens. Its default optimiser is schedule-free signum. AuxK is off by
    default. matched takes its Adam, whose schedule falls linearly from the warm-up on and cannot be set.
    """
    from sparsify import SparseCoderConfig, TrainConfig, Trainer
    from torch.optim import Adam
    from torch.utils.data import Dataset

    class Sequences(Dataset):
        """Row numbers, as token ids."""

        def __len__(self) -> int:
            return len(x) // SEQUENCE

        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return {"input_ids": torch.arange(i * SEQUENCE, (i + 1) * SEQUENCE)}

    own: dict[str, Any] = {}
    if matched is not None:
        own = {
            "optimizer": "adam",
            "lr": matched["lr"],
            "batch_size": matched["batch"] // SEQUENCE,
            "lr_warmup_steps": matched["warmup_steps"],
            "auxk_alpha": matched["auxk"],
            "dead_feature_threshold": matched["dead_after_tokens"],
        }
    sae_config = SparseCoderConfig(num_latents=job["d_sae"], k=job["k"])
    with tempfile.TemporaryDirectory() as tmp:
        config = TrainConfig(
            sae_config,
            hookpoints=["rows"],
            init_seeds=[job["seed"]],
            log_to_wandb=False,
            save_dir=tmp,
            save_every=10**9,
            **own,
        )
        x = x[: len(x) // (config.batch_size * SEQUENCE) * config.batch_size * SEQUENCE]
        trainer: Any = Trainer(config, Sequences(), Rows(x))
        # a wrapper such as ScheduleFree's keeps the step size where Adam does
        lr = trainer.optimizers[0].param_groups[0]["initial_lr" if isinstance(trainer.optimizers[0], Adam) else "lr"]
        clock = Clock()
        trainer.fit()
        times = clock.read()
        tensors = load_file(Path(tmp) / "unnamed" / "rows" / "sae.safetensors")
    adam = config.optimizer == "adam"
    settings = {
        "optimizer": config.optimizer,
        "lr": lr,
        "batch": config.batch_size * SEQUENCE,
        "steps": trainer.global_step,
        "warmup_steps": config.lr_warmup_steps if adam else 0,
        "decay_steps": trainer.global_step - config.lr_warmup_steps if adam else 0,
        "auxk": config.auxk_alpha,
        "dead_after_tokens": config.dead_feature_threshold,
    }
    return Trained(tensors, settings, *times)


TRAIN: dict[str, Callable[[Tensor, dict[str, Any], dict[str, Any] | None], Trained]] = {
    "nanosae": train_nanosae,
    "sae-lens": train_sae_lens,
    "eai-sparsify": train_sparsify,
    "dictionary-learning": train_dictionary_learning,
}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    library, out = job["library"], Path(job["out"])
    x = torch.from_numpy(read(Path(job["activations"]), 0, job["tokens"]))
    if library != "nanosae":
        x = shuffled(x, job["seed"])
    trained = TRAIN[library](x, job, job["matched"])
    if library == "nanosae":
        from sae.config import VERSION as version
        from sae.rundir import git_commit

        commit = git_commit()
    else:
        version, commit = importlib.metadata.version(library), None
    save_file({name: t.detach().contiguous() for name, t in trained.tensors.items()}, out / "weights.safetensors")
    run = {
        "version": version,
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "settings": trained.settings,
        "seconds": round(trained.seconds, 1),
        "cpu_seconds": round(trained.cpu_seconds, 1),
    }
    (out / "run.json").write_text(json.dumps(run, indent=1) + "\n")


if __name__ == "__main__":
    main()
