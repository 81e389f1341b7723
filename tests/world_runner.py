"""What test_distributed.py runs in four processes that serve all its cases, since starting them takes seconds.

    RANK=0..3 python -m tests.world_runner FOLDER GPT TEXT

Each case has some of the processes meet at a place of their own. Runs go to FOLDER/{architecture}_{layout}/, what else
was found to FOLDER/{case}.json.
"""

import contextlib
import json
import os
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from sae import base, checkpoint, distributed, files, trainer
from sae.config import SAEConfig, UserError
from sae.data.activations import ModelSource, Stream, TensorSource, gather
from sae.data.datasets import open_dataset
from sae.data.tokens import TokenRows
from sae.distributed import ALONE, World, arrange, balance
from sae.end_to_end import EndToEnd, RowStream, held_out
from sae.evaluator import evaluate
from sae.lm.language_model import load_language_model
from sae.models import KINDS, create_sae
from sae.trainer import SAETrainer
from tests.conftest import planted

WIDTHS = {"a": 16, "b": 24, "c": 16, "d": 16}  # hookpoints
STEPS, BATCH = 50, 64
# name -> hookpoints, --shard_latents, --distribute_modules
LAYOUTS = {
    "alone": (4, 1, False),
    "1x2": (1, 2, False),
    "2x1": (1, 1, False),
    "2x2": (1, 2, False),
    "plan": (4, 1, True),
}
RANK = int(os.environ.get("RANK", "0"))
MEETINGS: Counter = Counter()
STORES = []  # of the meetings that began here; an open one is found again by its port


# gives small blocks, as a model does, so that some of one waits for its place in the buffer
Blocks = partial(TensorSource, block_rows=50)


def meet(ranks):
    """A group of some of the processes, in this order; None in the others. The first opens a port and says which."""
    distributed.leave()
    if RANK not in ranks:
        return None
    place = Path(sys.argv[1]) / f"port_{'_'.join(map(str, ranks))}_{MEETINGS[tuple(ranks)]}"
    MEETINGS[tuple(ranks)] += 1
    if ranks[0] == RANK:
        STORES.append(dist.TCPStore("127.0.0.1", 0, is_master=True, multi_tenant=True, wait_for_workers=False))
        files.write_json(STORES[-1].port, place)
    while not place.exists():
        time.sleep(0.01)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": place.read_text().strip()}
    os.environ |= {"WORLD_SIZE": str(len(ranks)), "RANK": str(ranks.index(RANK))}
    return distributed.join(torch.device("cpu"))


def config(kind, **fields):
    sizes = {"d_sae": 96, "k": 4, "batch_size": BATCH, "dead_feature_threshold": 100, "learning_rate": 2e-3}
    often = {"log_every": 5, "eval_every": 25, "save_every": 1000}
    return SAEConfig(**{"activation": kind, "kernels": "plain", **sizes, **often, **fields})


def make(
    c, everyone, n_hookpoints, shards, modules, folder=None, n_rows=BATCH * STEPS, source=TensorSource, steps=STEPS
):
    """A trainer as scripts/sae_train.py makes it."""
    names = list(WIDTHS)[:n_hookpoints]
    acts = {n: 3 * planted(n_rows, WIDTHS[n], 32, 3, seed=ord(n))[0] + 1 for n in names}
    world = World(everyone, arrange(everyone.size, n_saes=len(names), shard_latents=shards, distribute_modules=modules))
    owner = balance({name: WIDTHS[name] for name in names}, world.n_groups)
    if c.transcode:
        acts |= {f"{name}@in": acts[name].roll(1, 1).tanh() + 0.5 for name in names}
    wanted = [[name for name in acts if owner[name.split("@")[0]] == g] for g in range(world.n_groups)]
    sizes = {"n_tokens": BATCH * steps, "batch_size": c.batch_size, "buffer_tokens": 512, "uses": c.num_epochs}
    stream = Stream(source(acts), **sizes, world=world, wanted=wanted)
    configs = {name: replace(c, d_in=WIDTHS[name], d_out=WIDTHS[name]) for name in names}
    saes = {n: create_sae(configs[n], world=world) if owner[n] == world.group else None for n in names}
    val = gather(TensorSource({n: x[:201] for n, x in acts.items()}), 201, "val", world=world, wanted=wanted)
    return SAETrainer(saes, c, stream, val, save_dir=folder, configs=configs, world=world)


def write(folder, name, value):
    (folder / f"{name}.json").write_text(json.dumps(value))


# --------------------------------------------------------------------------------------------------
# cases


def cells(folder, layout, ranks, kinds=tuple(KINDS)):
    """Every architecture in one layout."""
    everyone = meet(ranks)
    for kind in kinds if everyone is not None else ():
        make(config(kind), everyone, *LAYOUTS[layout], folder / f"{kind}_{layout}").train(verbose=False)


class Stopped(Exception):
    pass


CHAIN = (([0, 1, 2, 3], 2, True), ([0, 1], 1, False), ([0], 1, False), ([0, 1, 2, 3], 2, False))


def resume(folder):
    """4 processes (modules x latents), then 2 replicas, 1, and a mesh of 4; and once alone without a stop."""
    # BatchTopK would tell the ties apart that come of a token used twice in a batch
    c = config("topk", save_every=20, log_every=4, num_epochs=2, ema=0.9, batch_size=50)
    for i, (ranks, shards, modules) in enumerate(CHAIN):
        everyone = meet(ranks)
        if everyone is None:
            continue
        t = make(c, everyone, 2, shards, modules, folder / "resumed", n_rows=1010, source=Blocks)
        if i > 0:
            t.load_checkpoint()
        last, save = (20, 40, 60, 10_000)[i], t.save

        def save_and_stop(t=t, last=last, save=save):
            save()
            if t.step >= last:
                raise Stopped

        t.save = save_and_stop
        with contextlib.suppress(Stopped):
            t.train(verbose=False)
    if meet([0]) is not None:
        make(c, ALONE.everyone, 2, 1, False, folder / "uninterrupted", n_rows=1010, source=Blocks).train(verbose=False)


# Plain descent where Adam, which takes no notice of a gradient's size, would hide a wrong one.
PLAIN = {"optimizer": "sgd", "learning_rate": 0.01}
OPTIONS = {
    "resampling": (
        "topk",
        {
            "resample_every": 8,
            "micro_acc_steps": 2,
            "b_dec_init": "geometric_median",
            "scale_encoder": True,
            "optimizer": "signum",
        },
    ),
    "transcoder": ("topk", {"transcode": True, **PLAIN}),
    "skip transcoder": ("relu", {"transcode": True, "skip_connection": True, **PLAIN}),
    "nested transcoder": ("matryoshka", {"transcode": True, "resample_every": 4, **PLAIN}),
    "quadratic penalty": ("jumprelu", {"jumprelu_penalty": "quadratic", "tied": True, "micro_acc_steps": 3}),
    "prefixes of topk": ("matryoshka", {"matryoshka_base": "topk"}),
    "multi": ("topk", {"multi_topk": True, "k_decay_steps": 5}),
    "more than are positive": ("batchtopk", {"k": 60}),
    "layer norm": ("gated", {"normalize_activations": "layer_norm", "resample_every": 4}),
    "dead by rate": ("abstopk", {"dead_feature_threshold": None, "dead_percentage_threshold": 0.3}),
    "mean of errors": ("groupmax", {"loss_fn": "mse", "ema": 0.9, **PLAIN}),
}


def options(folder):
    """Settings beside the architecture, on a mesh and alone: how far weights and losses are apart."""
    everyone = meet([0, 1, 2, 3])
    found = {}
    for name, (kind, fields) in OPTIONS.items():
        c = config(kind, **fields)
        t = make(c, everyone, 1, 2, False, steps=15)
        t.train(verbose=False)
        if RANK > 0:
            continue
        alone = make(c, ALONE.everyone, 1, 1, False, steps=15)
        alone.train(verbose=False)
        ours, whole = t.learners["a"].sae, alone.learners["a"].sae
        own = slice(ours.own.start, ours.own.stop)
        wanted, got = {n: x if n in base.SHARED else x[own] for n, x in whole.tensors().items()}, ours.tensors()
        apart = {n: float((got[n] - x).norm() / x.norm().clamp(min=1e-6)) for n, x in wanted.items()}
        for key in ("loss", "aux", "grad_norm"):
            pairs = zip(t.train_losses, alone.train_losses, strict=True)
            apart[key] = max(abs(a[key] - b[key]) / max(abs(b[key]), 1e-3) for a, b in pairs)
        found[name] = apart
    if RANK == 0:
        write(folder, "options", found)


def count_bytes(folder):
    """What each collective is handed in one step after the first, by group; and the largest tensor along latents."""
    everyone = meet([0, 1, 2, 3])
    found = {}
    sizes = {}
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "all_to_all_single", "broadcast")}

    def counting(name):
        def call(*args, **options):
            x = args[0] if name in ("all_reduce", "broadcast") else args[1]
            found[id(options["group"])] = found.get(id(options["group"]), 0) + x.numel() * x.element_size()
            sizes[id(options["group"])] = max(sizes.get(id(options["group"]), 0), x.numel())
            return originals[name](*args, **options)

        return call

    result = {}
    cases = {kind: (config(kind, auxk_alpha=0.0), 1, 2, False) for kind in KINDS}
    cases["transcoder"] = (config("topk", auxk_alpha=0.0, transcode=True), 1, 2, False)
    cases["in parts"] = (config("topk", auxk_alpha=0.0, micro_acc_steps=2), 1, 2, False)
    cases["plan"] = (config("topk", auxk_alpha=0.0), 2, 1, True)
    for name, case in cases.items():
        t = make(case[0], everyone, *case[1:])
        t._begin_run()
        t._step(next(t.stream))
        t.step = 1
        for call in originals:
            setattr(dist, call, counting(call))
        found.clear(), sizes.clear()
        t._step(next(t.stream))
        for call, original in originals.items():
            setattr(dist, call, original)
        of = {axis: found.get(id(getattr(t.world, axis).group), 0) for axis in ("data", "latents")}
        everywhere = everyone.objects(found.get(id(everyone.group), 0))
        result[name] = {**of, "everyone": everywhere, "largest": sizes.get(id(t.world.latents.group), 0)}
    if RANK == 0:
        write(folder, "bytes", result)


def differing(folder):
    """A bit flipped on one of the replicas is found, and the tensor named."""
    everyone = meet([0, 1])
    if everyone is None:
        return
    t = make(config("topk"), everyone, 1, 1, False)
    step = t._step

    def flip(batch):
        step(batch)
        if t.step == 6 and RANK == 1:
            with torch.no_grad():
                t.learners["a"].sae.W_enc[3, 7] *= 1.0000002

    t._step = flip
    try:
        t.train(verbose=False)
        message = "nothing was noticed"
    except UserError as e:
        message = str(e)
    if RANK == 0:
        write(folder, "differing", [t.step, message])


def crowded(folder):
    """All of a token's largest latents on one shard of four, which offers too few at first."""
    everyone = meet([0, 1, 2, 3])
    distributed.CAPACITY = 1
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    level = create_sae(SAEConfig(d_in=16, d_sae=64, k=8, kernels="plain"), world=World(everyone, (1, 1, 4)))
    with torch.no_grad():
        level.W_enc.zero_()  # all pre-activations are equal
        level.b_enc.fill_(1.0)
    kept = level.codes(x)[0].activity(16)[0]
    n_kept = level.world.latents.sum_(kept.clone())
    result = []
    for kind in ("topk", "abstopk", "batchtopk"):
        world = World(everyone, (1, 1, 4))
        c = SAEConfig(d_in=16, d_sae=64, k=8, activation=kind, kernels="plain")
        alone, sharded = create_sae(c), create_sae(c, world=world)
        with torch.no_grad():
            for sae in (alone, sharded):
                for i, latent in enumerate(sae.own):
                    sae.b_enc[i] = 20.0 if 16 <= latent < 28 else 0.0
        whole = sharded.survey([x])
        codes = sharded.codes(x, whole=whole)[0].dense(16)
        together = world.latents.gather(codes.detach()).transpose(0, 1).flatten(1)
        result.append(float((together - alone.codes(x)[0].dense(64).detach()).abs().max()))
    least = [
        world.team.kth_largest(torch.tensor(v[RANK]), n).item()
        for v, n in (
            ([[1.0, -2.0], [3.0, 3.0], [], [-5.5]], 3),
            ([[-1.0], [-2.0], [-3.0], [-4.0]], 9),
            ([[0.1, 0.2]] * 4, 5),
            ([[-0.0], [0.0], [1e-30], [-1e30]], 2),
        )
    ]
    if RANK == 0:
        write(folder, "crowded", [result, least, [int(n_kept.min()), int(n_kept.max())]])


def text(folder, gpt, corpus):
    """A live model read by turns gives the batches of one process; an SAE is measured alike."""
    lm, dataset = load_language_model(gpt, device="cpu"), open_dataset(corpus)
    hookpoint = "transformer.h.1"

    def batches(world):
        source = ModelSource(TokenRows(lm, dataset, "train", 32), [hookpoint], model_batch_size=3)
        stream = Stream(source, n_tokens=900, batch_size=61, buffer_tokens=256, world=world)
        return [world.everyone.objects(b[hookpoint].tolist()) for b in stream]

    sae = create_sae(SAEConfig(d_in=32, d_sae=64, k=4))
    held_out_text = TokenRows(lm, dataset, "val", 32)
    sizes = {"n_tokens": 1000, "model_batch_size": 4, "mean_tokens": 300}
    measure = lambda world: evaluate(sae, hookpoint, held_out_text, **sizes, world=world)[0]
    reports, difference = {}, []
    alone = batches(ALONE)
    for ranks in ([0, 1, 2], [0, 1, 2, 3]):
        everyone = meet(ranks)
        if everyone is None:
            continue
        world = World(everyone)
        for ours, one in zip(batches(world), alone, strict=True):
            rows, wanted = (torch.tensor(sorted(sum(parts, []))) for parts in (ours, one))
            difference.append(float((rows - wanted).abs().max()))
            assert max(map(len, ours)) - min(map(len, ours)) <= 1
        reports[len(ranks)] = measure(world)
    if RANK == 0:
        write(folder, "text", [max(difference), {"1": measure(ALONE), **reports}])


def end_to_end(folder, gpt, corpus):
    """The model's own loss, on two replicas and alone, in parts; more than a part of the latents dead."""
    everyone = meet([0, 1])
    if everyone is None:
        return
    lm, dataset = load_language_model(gpt, device="cpu"), open_dataset(corpus)
    names = ["transformer.h.0", "transformer.h.1"]
    source = lambda split: ModelSource(TokenRows(lm, dataset, split, 32), names, model_batch_size=3)

    def run(world, kind, activation):
        c = config(activation, d_in=32, batch_size=160, loss_fn=kind, fvu_coefficient=0.3, **PLAIN)
        stream = RowStream(source("train"), n_tokens=160 * 12, batch_size=160, world=world)
        goal = EndToEnd(lm, kind, held_out(source("val"), 300), model_batch_size=2, world=world)
        val = gather(source("val"), 201, "val", world=world)
        saes = {n: create_sae(c, world=world) for n in names}
        t = SAETrainer(saes, c, stream, val, objective=goal, world=world)
        t.train(verbose=False)
        return [one.sae.state_dict() for one in t.learners.values()], t.train_losses + t.val_losses

    found = {}
    for kind, activation in (("kl", "topk"), ("ce", "jumprelu")):
        (ours, lines), (alone, want) = run(World(everyone), kind, activation), run(ALONE, kind, activation)
        apart = {
            f"{i} {name}": float((a[name] - b[name]).norm() / b[name].norm())
            for i, (a, b) in enumerate(zip(ours, alone, strict=True))
            for name in b
        }
        for name in ("loss", "aux", "l0", "grad_norm", "total_loss"):
            pairs = [(a[name], b[name]) for a, b in zip(lines, want, strict=True) if name in b]
            apart[name] = max(abs(a - b) / max(abs(b), 1e-3) for a, b in pairs)
        found[activation] = [apart, max(line.get("aux", 0.0) for line in want)]
    if RANK == 0:
        write(folder, "end_to_end", found)


def main(folder, gpt, corpus):
    distributed.TIMEOUT_S = 300
    checkpoint.KEPT, trainer.CHECK_EVERY = 10, 5
    torch.set_num_threads(1)
    cells(folder, "alone", [RANK], tuple(KINDS)[RANK::4])
    cells(folder, *(("1x2", [0, 1]) if RANK < 2 else ("2x1", [2, 3])))
    cells(folder, "2x2", [0, 1, 2, 3])
    cells(folder, "plan", [0, 1, 2])
    options(folder)
    count_bytes(folder)
    differing(folder)
    text(folder, gpt, corpus)
    end_to_end(folder, gpt, corpus)
    crowded(folder)
    resume(folder)
    distributed.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
