"""Time the training steps of one library, for bench_step.py and bench_quality.py, which start this file.

    python benchmarks/step_runner.py '{"library": "nanosae", "kernels": "auto", "B": 4096, "D": 128, ...}'

"lr" sets a step size, "fvu" has the trained SAE measured on tokens held out, "n_tokens" says how many there are to
train on. Each library runs in its own process and may live in its own environment, so this file needs only torch, and
imports a library where it is used. A peer's own trainer runs at its defaults on batches made in advance, and the clock
is read when it asks for the next one, so a step is everything that it does between two batches. Prints a line of json.

Letters: B tokens in a batch, D width, F latents, K kept latents.
"""

from __future__ import annotations

import importlib.metadata
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

N_BATCHES, SEQUENCE, HELD_OUT = 4, 256, 4096


def data(D: int, n: int) -> Tensor:
    """(n, D): mixtures of 20 of 8 D unit directions with power-law frequencies, a common mean, and noise.

    The seed is none that a contender draws its first weights from: they would be these very directions.
    """
    g = torch.Generator().manual_seed(20_011)
    directions = torch.nn.functional.normalize(torch.randn(8 * D, D, generator=g), dim=1)
    shares = torch.arange(1, 8 * D + 1).float() ** -0.7
    x = torch.empty(n, D)
    for rows in x.split(4096):
        chosen = torch.multinomial(shares, len(rows) * 20, replacement=True, generator=g).view(len(rows), 20)
        sizes = torch.rand(len(rows), 20, generator=g) + 0.5
        rows.copy_(torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=sizes, mode="sum"))
    return x + torch.randn(D, generator=g) + 0.05 * torch.randn(n, D, generator=g)


class Stamped:
    """Batches, over and over; remembers when each was asked for."""

    def __init__(self, x: Tensor, B: int, n: int):
        self.batches, self.n = x.split(B), n
        self.stamps: list[float] = []

    def __iter__(self) -> Iterator[Tensor]:
        for i in range(self.n):
            yield self.at(i)
        self.stamps.append(time.perf_counter())

    def at(self, i: int) -> Tensor:
        self.stamps.append(time.perf_counter())
        return self.batches[i % len(self.batches)]

    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self.stamps, self.stamps[1:], strict=False)]


def split(x: Tensor, job: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What to train on, and what is held out of it, if the trained SAE is to be measured."""
    return (x[:-HELD_OUT], x[-HELD_OUT:]) if "fvu" in job else (x, x[:0])


def fvu(x: Tensor, x_hat: Tensor) -> float:
    """Sum of |x - x_hat|^2 over sum of |x - mean|^2."""
    return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


def timed(module: Any, name: str) -> list[float]:
    """From now on, the seconds of each call of a module's function."""
    seconds: list[float] = []
    function = getattr(module, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    setattr(module, name, call)
    return seconds


def nanosae(x: Tensor, job: dict[str, Any]) -> dict[str, Any]:
    """Learner.learn and update, its whole step; and pieces: its encoder, of the same steps, and the float32 product."""
    from sae.config import SAEConfig
    from sae.kernels import native, selection
    from sae.learner import Learner
    from sae.models import create_sae

    native.enabled = job["kernels"] == "auto"
    native.keep_memory()
    size = {"d_in": job["D"], "d_sae": job["F"], "k": job["K"], "batch_size": job["B"]}
    c = SAEConfig(**size, learning_rate=job.get("lr"))
    x, held_out = split(x, job)
    learner = Learner(create_sae(c), c, job["steps"] if "fvu" in job else 1000, torch.device("cpu"))
    start = time.perf_counter()
    learner.start_from({"": x[: 4 * job["B"]]})
    start = time.perf_counter() - start
    encoder = timed(selection, "choose_top_k") if "fvu" not in job else []  # there AuxK takes some of them
    batches = Stamped(x, job["B"], job["steps"])
    for step, batch in enumerate(batches):
        learner.learn({"": batch}, step)
        learner.update(step)
        if "fvu" in job and step % c.log_every == 0:
            learner.read_window()
    if "fvu" in job:
        sae = learner.finished()
        seconds = [start, *batches.seconds()]
        return {"seconds": seconds, "fvu": fvu(held_out, sae(held_out).x_hat), "kernels": native.status()}
    W, b = learner.sae.W_enc.detach(), learner.sae.b_enc.detach()
    rows, pre = x[: job["B"]] - x[: job["B"]].mean(0), torch.empty(job["B"], job["F"])
    product = []
    for _ in range(3):
        start = time.perf_counter()
        torch.addmm(b, rows, W, out=pre)
        product.append(time.perf_counter() - start)
    return {"seconds": batches.seconds(), "kernels": native.status(), "product": product, "encoder": encoder}


def sae_lens(x: Tensor, job: dict[str, Any]) -> dict[str, Any]:
    """SAETrainer on TopKTrainingSAE."""
    from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae_config = TopKTrainingSAEConfig(d_in=job["D"], d_sae=job["F"], k=job["K"], device="cpu")
    config: Any = LanguageModelSAERunnerConfig(
        sae=sae_config,
        device="cpu",
        checkpoint_path=None,
        output_path=None,
        verbose=False,
        training_tokens=job["B"] * job["steps"],
        train_batch_size_tokens=job["B"],
        logger=LoggingConfig(log_to_wandb=False),
    )
    batches = Stamped(x, job["B"], job["steps"] + 1)
    SAETrainer(config.to_sae_trainer_config(), TopKTrainingSAE(sae_config), iter(batches)).fit()
    return {"seconds": batches.seconds()}


def dictionary_learning(x: Tensor, job: dict[str, Any]) -> dict[str, Any]:
    """trainSAE with TopKTrainer."""
    from dictionary_learning.trainers.top_k import TopKTrainer
    from dictionary_learning.training import trainSAE

    config = {
        "trainer": TopKTrainer,
        "steps": job["steps"],
        "activation_dim": job["D"],
        "dict_size": job["F"],
        "k": job["K"],
        "layer": 0,
        "lm_name": "rows",
        "device": "cpu",
        "warmup_steps": 1,
    }
    batches = Stamped(x, job["B"], job["steps"] + 1)
    with tempfile.TemporaryDirectory() as tmp:
        trainSAE(batches, [config], job["steps"], save_dir=tmp, device="cpu")
    return {"seconds": batches.seconds()}


def sparsify(x: Tensor, job: dict[str, Any]) -> dict[str, Any]:
    """Its Trainer, on a stand-in model whose one layer hands out the batches; its Adam, or its default optimiser."""
    from sparsify import SparseCoderConfig, TrainConfig, Trainer

    x, held_out = split(x, job)
    own: dict[str, Any] = {"lr": job["lr"], "lr_warmup_steps": 0} if "lr" in job else {}
    batches = Stamped(x, job["B"], job["steps"])

    class Rows(nn.Module):
        """Its layer `rows` gives the next batch, whatever is asked."""

        def __init__(self) -> None:
            super().__init__()
            self.rows, self.i = nn.Identity(), 0
            self.base_model, self.device = self, torch.device("cpu")
            self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}

        def forward(self, input_ids: Tensor) -> Tensor:
            if len(input_ids) == 1:  # it asks for the width
                return self.rows(x[:1].unsqueeze(0))
            self.i += 1
            return self.rows(batches.at(self.i - 1).view(-1, SEQUENCE, job["D"]))

    sequences = [{"input_ids": torch.zeros(SEQUENCE, dtype=torch.int64)}] * (job["steps"] * job["B"] // SEQUENCE)
    with tempfile.TemporaryDirectory() as tmp:
        config = TrainConfig(
            SparseCoderConfig(num_latents=job["F"], k=job["K"]),
            hookpoints=["rows"],
            log_to_wandb=False,
            save_dir=tmp,
            save_every=10**9,
            batch_size=job["B"] // SEQUENCE,
            optimizer=job["optimizer"],
            **own,
        )
        trainer: Any = Trainer(config, sequences, Rows())
        trainer.fit()
    found = {"fvu": fvu(held_out, trainer.saes["rows"](held_out).sae_out.detach())} if "fvu" in job else {}
    return {"seconds": batches.seconds(), **found}


LIBRARIES: dict[str, Callable[[Tensor, dict[str, Any]], dict[str, Any]]] = {
    "nanosae": nanosae,
    "sae-lens": sae_lens,
    "dictionary-learning": dictionary_learning,
    "eai-sparsify": sparsify,
}


def main() -> None:
    job = json.loads(sys.argv[1])
    x = data(job["D"], job.get("n_tokens", N_BATCHES * job["B"]))
    result = LIBRARIES[job["library"]](x, job)
    if job["library"] != "nanosae":
        result["version"] = importlib.metadata.version(job["library"])
    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result["torch"], result["threads"] = torch.__version__, torch.get_num_threads()
    sys.stdout.write("\n" + json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
