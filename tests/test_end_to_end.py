"""End-to-end losses: zero for a perfect reconstruction, gradients to the SAEs alone, masked positions as they were.

Run: python -m pytest tests/test_end_to_end.py
"""

import json

import pytest
import torch
import torch.nn.functional as F

from sae import hooks
from sae.config import SAEConfig, UserError
from sae.data.activations import ModelSource
from sae.data.datasets import open_dataset
from sae.data.tokens import TokenRows
from sae.dead import add_gradients_
from sae.end_to_end import EndToEnd, Rows, RowStream, held_out
from sae.formats import store
from sae.learner import Learner
from sae.models import create_sae
from sae.trainer import SAETrainer
from scripts import sae_train
from tests.conftest import call

HOOK, LAST = "transformer.h.1", "transformer.h.2"
CPU = torch.device("cpu")


def source(lm, text_file, split="train", names=(HOOK,), **fields):
    return ModelSource(TokenRows(lm, open_dataset(str(text_file)), split, 32, **fields), list(names))


def config(**fields):
    return SAEConfig(**{"d_in": 32, "d_sae": 64, "k": 4, "batch_size": 64, "loss_fn": "kl", **fields})


def learner(hookpoint=HOOK, **fields):
    c = config(**fields)
    return Learner(create_sae(c), c, 50, CPU, hookpoint)


def perfect(hookpoint=HOOK, **fields):
    """A TopK SAE whose latents are x and -x, so that it loses nothing."""
    one = learner(hookpoint, k=32, **fields)
    eye = torch.eye(32)
    with torch.no_grad():
        one.sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        one.sae.W_dec.copy_(torch.cat([eye, -eye]))
    return one


def batch(lm, text_file, n=6, **fields):
    stream = RowStream(source(lm, text_file, **fields), n_tokens=32 * n, batch_size=32 * n)
    return next(stream)


def log_probs(lm, rows, edits=None):
    with torch.no_grad(), hooks.hooked(lm.module, edits or {}):
        return lm.forward_fn(lm.module, rows.ids, rows.valid)[:, :-1].log_softmax(-1)


def test_a_perfect_reconstruction_costs_nothing(lm, text_file):
    rows = held_out(source(lm, text_file, "val"), 600)
    assert sum(int(r.keep.sum()) for r in rows) >= 600
    both = {HOOK: perfect(), LAST: perfect(LAST)}
    assert EndToEnd(lm, "kl", rows).validate(both) < 1e-6
    total = n = 0
    for r in rows:
        counted = r.keep[:, :-1] & r.valid[:, 1:]
        losses = F.nll_loss(log_probs(lm, r).transpose(1, 2), r.ids[:, 1:], reduction="none")
        total, n = total + float(losses[counted].sum()), n + int(counted.sum())
    assert EndToEnd(lm, "ce", rows).validate(both) == pytest.approx(total / n, rel=1e-6)
    assert EndToEnd(lm, "kl", rows).validate({HOOK: learner()}) > 0.01  # of an untrained one


def test_kl_is_that_of_the_clean_from_the_spliced(lm, text_file):
    one = learner()
    rows = held_out(source(lm, text_file, "val"), 300)
    sae, total, n = one.finished(), 0.0, 0
    for r in rows:

        def put(x, r=r):
            return torch.where(r.keep[..., None], sae(x.flatten(0, 1)).x_hat.view_as(x), x)

        clean, spliced = log_probs(lm, r).double(), log_probs(lm, r, {HOOK: put}).double()
        counted = r.keep[:, :-1] & r.valid[:, 1:]
        total += float((clean.exp() * (clean - spliced)).sum(-1)[counted].sum())
        n += int(counted.sum())
    assert EndToEnd(lm, "kl", rows).validate({HOOK: one}) == pytest.approx(total / n, rel=1e-5)


@pytest.mark.parametrize("kind", ["ce", "kl"])
def test_gradients_reach_every_sae_and_nothing_else(lm, text_file, kind):
    both = {HOOK: learner(fvu_coefficient=0.0), LAST: learner(LAST, fvu_coefficient=0.0)}
    rows = batch(lm, text_file)
    for one in both.values():
        one.scale = one.scale_out = 0.5
    EndToEnd(lm, kind, []).learn(rows, both, 0)
    assert all(p.grad is None for p in lm.module.parameters())
    for one in both.values():
        assert all(float(p.grad.abs().sum()) > 0 for p in one.sae.parameters())


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu"])
def test_a_batch_in_parts_gives_the_gradient_of_the_whole(lm, text_file, activation):
    found = []
    for size in (64, 2):
        one = learner(fvu_coefficient=0.3, activation=activation)
        one.sae.b_dec.data += 0.1
        one.firing.tokens_since_fired[:20] = one.firing.dead_after + 1
        one.firing.list_()
        one.n_updates, one.residual = 1, torch.tensor(2.0)  # before the first update each part has its own
        EndToEnd(lm, "kl", [], model_batch_size=size).learn(batch(lm, text_file), {HOOK: one}, 0)
        if one.spare is not None:  # what AuxK learned, of all parts
            add_gradients_(one.sae, one.spare)
        found.append(({n: p.grad for n, p in one.sae.named_parameters()}, one.window.sums["loss"], one.counts))
    (whole, loss, counts), (parts, loss_, counts_) = found
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss_, loss)
    assert torch.equal(counts_.fired, counts.fired)


def test_masked_positions_keep_their_activations(lm, text_file):
    rows = batch(lm, text_file, skip_first=True)
    keep = rows.keep.clone()
    keep[:, 3:6] = False
    rows = Rows(rows.ids, rows.valid, keep)
    assert not keep[:, 0].any()
    seen = []
    with hooks.hooked(lm.module, {f"{LAST}@in": lambda x: seen.append(x.detach().clone())}):
        lm.logits(rows.ids, rows.valid)
        EndToEnd(lm, "ce", []).learn(rows, {HOOK: learner()}, 0)
    clean, spliced = seen
    assert torch.equal(clean[~keep], spliced[~keep])
    assert (clean[keep] != spliced[keep]).any(-1).all()


def test_end_to_end_training_lowers_its_loss_and_resumes_to_the_bit(lm, text_file, tmp_path):
    c = config(batch_size=128, save_every=20, eval_every=20, log_every=10, ema=0.9)

    def run(folder):
        src = source(lm, text_file)
        stream = RowStream(src, n_tokens=128 * 60, batch_size=128)
        goal = EndToEnd(lm, "kl", held_out(source(lm, text_file, "val"), 400))
        val = {HOOK: src.lm.hidden(*next_rows(lm, text_file), [HOOK])[HOOK].flatten(0, 1)}
        return SAETrainer({HOOK: create_sae(c)}, c, stream, val, save_dir=folder, objective=goal)

    whole = run(tmp_path / "run")
    whole.train(verbose=False)
    losses = [v["total_loss"] for v in whole.val_losses]
    assert losses[-1] < 0.7 * losses[0]
    (tmp_path / "run" / "checkpoint_step60.pt").unlink()
    again = run(tmp_path / "run")
    again.load_checkpoint()
    assert again.step == 40
    again.train(verbose=False)
    assert all(torch.equal(a, b) for a, b in zip(whole.sae.parameters(), again.sae.parameters(), strict=True))


def next_rows(lm, text_file):
    rows = held_out(source(lm, text_file, "val"), 100)[0]
    return rows.ids, rows.valid


def test_through_the_script(here, base, capsys):
    small = [
        "--k",
        4,
        "--batch_size",
        128,
        "--ctx_len",
        32,
        "--max_tokens",
        1280,
        "--val_tokens",
        300,
        "--layers",
        0,
        1,
    ]
    for name, more in {
        "kl": ["--loss_fn", "kl"],
        "mixed": ["--loss_fn", "ce", "--fvu_coefficient", 0.5, "--activation", "jumprelu"],
        "skip": ["--loss_fn", "kl", "--hook_type", "mlp", "--transcode", "--skip_connection"],
    }.items():
        assert call(sae_train, *base, *small, *more, "--run_name", name, "--log_every", 5) == 0
        saes = store.load_saes(here / "sae_models" / name)
        assert len(saes) == 2
        lines = [json.loads(x) for x in (here / "sae_models" / name / "metrics.jsonl").read_text().splitlines()]
        assert all(x["objective"] > 0 for x in lines if "objective" in x)
        assert any("val_total_loss" in x for x in lines)


def test_a_model_without_a_head_is_refused(minilm_path):
    from sae.lm.language_model import load_language_model

    bert = load_language_model(minilm_path, device="cpu")
    with pytest.raises(UserError, match="no next-token head"):
        EndToEnd(bert, "ce", [])
