"""Watching changes nothing, steering changes what was asked and nothing else, and both are gone afterwards.

Run: python -m pytest tests/test_runtime.py
"""

import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from sae import hooks
from sae.config import SAEConfig, UserError
from sae.edits import Edit
from sae.kernels.sparse import Codes
from sae.lm.language_model import load_language_model
from sae.models import KINDS, create_sae
from sae.runtime import InterpretableModel
from tests.conftest import HOOK, n_hooks

PROMPT = "alpha beta gamma delta epsilon"


def an_sae(activation="topk", d=32, seed=0, **fields):
    """Untrained, with latents of different sizes; groups, thresholds and gates that matter."""
    sae = create_sae(SAEConfig(d_in=d, d_sae=96, k=8, activation=activation, seed=seed, **fields)).eval()
    g = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in [*sae.named_parameters(), *sae.named_buffers()]:
            if name.startswith("b_"):
                p.copy_(0.1 * torch.randn(p.shape, generator=g))
            elif name == "threshold":
                p.copy_(0.1 + 0.3 * torch.rand(p.shape, generator=g) if activation == "jumprelu" else torch.tensor(0.3))
            elif name == "W_dec" and sae.config.transcode:
                p.copy_(torch.randn(p.shape, generator=g) / 5)
    return sae.requires_grad_(False)


def exact_sae(d=32):
    """Orthonormal rows, and a bias that keeps all latents active: x is exactly the sum of f * row, plus b_dec."""
    sae = create_sae(SAEConfig(d_in=d, d_sae=d, activation="relu")).eval()
    rows = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(3)).double())[0].float()
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.t())
        sae.b_dec.copy_(-10 * rows.sum(0))
    return sae.requires_grad_(False)


def prompt_ids(lm, *texts):
    rows = [lm.tokenizer.encode_document(t) for t in texts or (PROMPT,)]
    return torch.tensor([row[: min(map(len, rows))] for row in rows])


def logits(lm, ids):
    return lm.logits(ids, torch.ones_like(ids, dtype=torch.bool))


def held(lm, ids, hook=HOOK):
    """What the hookpoint holds, (N, T, D)."""
    return lm.hidden(ids, torch.ones_like(ids, dtype=torch.bool), [hook])[hook]


def write(lm, ids, n=12, **options):
    """The prompt with a greedy answer behind it."""
    return torch.cat([ids, *lm.module.generate(ids, n, temperature=0, **options)], 1)


# ----------------------------------------------------------------------------------------------------------------------
# tracking


@pytest.mark.parametrize("kind", KINDS)
def test_tracking_is_encode_and_changes_no_bit(lm, kind):
    sae, ids = an_sae(kind), prompt_ids(lm, PROMPT, "zeta eta theta iota kappa mu nu")
    clean, want = logits(lm, ids), sae.encode(held(lm, ids))
    chosen = [5, 0, 95, 17, int(want[0, 0].argmax()), int(want[0, 0].argmax())]
    live = InterpretableModel(lm, {HOOK: sae})
    with live.track(top_k=6) as seen, live.track(latents=chosen) as some:
        assert torch.equal(logits(lm, ids), clean)
    strongest = want.abs().topk(6, dim=-1)
    found = seen.features()
    assert found.indices.shape == (2, ids.shape[1], 6)
    torch.testing.assert_close(found.values.abs(), strongest.values, rtol=1e-5, atol=1e-6)
    active = found.values != 0
    torch.testing.assert_close(want.gather(-1, found.indices)[active], found.values[active], rtol=1e-5, atol=1e-6)
    assert active.any()
    torch.testing.assert_close(some.values(), want[..., chosen], rtol=1e-5, atol=1e-6)
    assert torch.equal(seen.features(last=True).values, found.values[:, -1:])


@pytest.mark.parametrize("texts", [(PROMPT,), (PROMPT, "xi omicron pi rho sigma mu")], ids=["one", "batch"])
def test_cache_or_not_the_same_features(lm, texts):
    """The model and two hookpoints; the record is that of every token which was read."""
    saes = {HOOK: an_sae("topk"), "transformer.h.2": an_sae("jumprelu", seed=5)}
    live, ids = InterpretableModel(lm, saes), prompt_ids(lm, *texts)
    records = []
    for use_cache in (True, False):
        with live.track(top_k=8) as seen, live.track([HOOK], latents=[1, 2, 3]) as some:
            text = write(lm, ids, use_cache=use_cache)
        read = text[:, :-1]  # the newest token has not been read yet
        for name, sae in saes.items():
            want = sae.encode(held(lm, read, name))
            found = seen.features(name)
            assert found.indices.shape == (*read.shape, 8)
            dense = torch.zeros_like(want).scatter_add_(-1, found.indices, found.values)
            torch.testing.assert_close(dense.topk(8).values, want.topk(8).values, rtol=0, atol=1e-5)
        assert some.values().shape == (*read.shape, 3)
        records.append((text, *(seen.features(name) for name in saes), some.values()))
    assert torch.equal(records[0][0], records[1][0])
    for a, b in zip(records[0][1:3], records[1][1:3], strict=True):
        torch.testing.assert_close(a.values, b.values, rtol=0, atol=1e-5)
    torch.testing.assert_close(records[0][3], records[1][3], rtol=0, atol=1e-5)


def test_a_cache_cut_in_the_middle_of_a_prompt(lm):
    """As assisted decoding does with what it drew and dropped."""
    live, x = InterpretableModel(lm, {HOOK: an_sae()}), torch.randn(1, 12, 32)
    with live.track(latents=[1, 2, 3]) as seen:
        for past, part in ((0, x[:, :10]), (6, x[:, 6:9]), (9, x[:, 9:])):
            seen.add(HOOK, part, past)
    with live.track(latents=[1, 2, 3]) as whole:
        whole.add(HOOK, x, 0)
    torch.testing.assert_close(seen.values(), whole.values())


def test_a_new_prompt_begins_a_new_record(lm):
    live = InterpretableModel(lm, {HOOK: an_sae()})
    with live.track() as seen:
        write(lm, prompt_ids(lm), 3)
        ids = prompt_ids(lm, "mu nu")
        write(lm, ids, 2)
        assert seen.features().values.shape[:2] == (1, ids.shape[1] + 1)


def test_records_outlive_their_block_and_say_what_they_are(lm):
    live = InterpretableModel(lm, {HOOK: an_sae()})
    with live.track() as seen, pytest.raises(UserError, match="has not run"):
        seen.features()
    with pytest.raises(UserError, match="at least 1"), live.track(top_k=0):
        pass
    with live.track() as seen:
        logits(lm, prompt_ids(lm))
    with pytest.raises(UserError, match="no latents were chosen"):
        seen.values()
    with pytest.raises(UserError, match="not tracked"):
        seen.features("transformer.h.0")
    with live.track(latents=[3]) as some:
        logits(lm, prompt_ids(lm))
    with pytest.raises(UserError, match="chosen latents"):
        some.features()
    with pytest.raises(UserError, match="0 to 95"), live.track(latents=[96]):
        pass
    with pytest.raises(UserError, match="did you mean 'transformer.h.1'"), live.track(["transformer.h.11"]):
        pass


# ----------------------------------------------------------------------------------------------------------------------
# steering


def test_steering_by_nothing_changes_no_bit(lm):
    ids = prompt_ids(lm)
    clean = logits(lm, ids)
    for kind in KINDS:
        live = InterpretableModel(lm, {HOOK: an_sae(kind)})
        with live.steer("3:+0", "4:*1", "5:+0@generated", "6:<1e6", "7:+9?8>1e6", stop=["9>1e6"]) as steering:
            assert torch.equal(logits(lm, ids), clean), kind
        assert not steering.stopped.any()
    with live.steer():
        assert torch.equal(logits(lm, ids), clean)


def test_a_model_in_half_precision_is_watched_and_steered(gpt_path):
    """The nanochat document's InterpretableModel could not: the SAE's float32 met the model's bfloat16."""
    lm = load_language_model(gpt_path, device="cpu", dtype="bfloat16")
    ids = prompt_ids(lm)
    clean, x = logits(lm, ids), held(lm, ids)
    for kind in KINDS:
        sae = an_sae(kind)
        live = InterpretableModel(lm, {HOOK: sae})
        with live.steer("3:+0", "4:*1", "6:<1e6"), live.track(top_k=96) as seen:
            assert torch.equal(logits(lm, ids), clean), kind
        found = Codes(*(t.flatten(0, 1) for t in seen.features()))
        torch.testing.assert_close(found.dense(96), sae.encode(x.float()).flatten(0, 1))
        with live.steer("3:+8"):
            assert not torch.equal(logits(lm, ids), clean)
        moved = steered(live, lm, ids, "3:+8").float() - x.float()
        torch.testing.assert_close(moved[0, 1:], (8 * sae.W_dec[3]).expand_as(moved[0, 1:]), rtol=0.05, atol=0.05)


def steered(live, lm, ids, *edits, hook=HOOK):
    """What the hookpoint holds under edits, as the next block gets it."""
    with live.steer(*edits):
        return held(lm, ids, f"{hook[:-1]}{int(hook[-1]) + 1}@in")


def test_edits_take_the_asked_value_where_the_sae_is_exact(lm):
    sae, ids = exact_sae(), prompt_ids(lm)
    x = held(lm, ids)
    f = sae.encode(x)
    torch.testing.assert_close(sae(x).x_hat.view_as(x), x, rtol=1e-5, atol=2e-5)  # some 10 times the last bit of b_dec
    live = InterpretableModel(lm, {HOOK: sae}, special_ids=(), max_activations={HOOK: torch.arange(32.0)})
    assert float((f[..., 7] - 4).abs().min()) > 0.1
    with live.steer("7:=4", "8:*0", "9:*2", "10:+1.5", "11:-1", "12:=0.5max"), live.track(latents=range(32)) as seen:
        logits(lm, ids)
    want = f.clone()
    want[..., 7], want[..., 8], want[..., 12] = 4, 0, 6
    want[..., 9] *= 2
    want[..., 10] += 1.5
    want[..., 11] -= 1
    torch.testing.assert_close(seen.values(), want, rtol=1e-5, atol=2e-5)


def test_only_the_latent_moves_and_the_error_stays(lm):
    """An SAE that explains little: what it leaves unexplained is the same to the last digits after every edit."""
    ids = prompt_ids(lm, PROMPT, "zeta eta theta iota kappa mu nu")
    for kind in ("topk", "gated", "batchtopk"):
        sae = an_sae(kind)
        live, x = InterpretableModel(lm, {HOOK: sae}, special_ids=()), held(lm, ids)
        f, out = sae.encode(x), sae(x)
        error = x - out.x_hat.view_as(x)
        assert float(error.norm() / x.norm()) > 0.3
        i = int((f > 0).sum((0, 1)).argmax())
        row = sae.W_dec[i]
        for text, new in (
            ("=4", torch.full_like(f[..., i], 4)),
            ("*0", 0 * f[..., i]),
            ("*3", 3 * f[..., i]),
            ("+2", f[..., i] + 2),
        ):
            y = steered(live, lm, ids, f"{i}:{text}")
            torch.testing.assert_close(y, x + (new - f[..., i])[..., None] * row, rtol=1e-5, atol=1e-5)
            edited = f.clone()
            edited[..., i] = new
            torch.testing.assert_close(y - sae.decode(edited), error, rtol=1e-4, atol=1e-5)


def test_directions_are_projected_out_and_capped(lm):
    sae, ids = an_sae(), prompt_ids(lm)
    with torch.no_grad():
        sae.W_dec[5] *= 3  # rows of any length
    live, x = InterpretableModel(lm, {HOOK: sae}, special_ids=()), held(lm, ids)
    row = sae.W_dec[5]
    along = lambda y: (y @ row) / row.square().sum()
    rest = lambda y: y - along(y)[..., None] * row
    for text, new in (
        ("5:|0", 0 * along(x)),
        ("5:|2", torch.full_like(along(x), 2)),
        ("5:<0.01", along(x).clamp(max=0.01)),
    ):
        y = steered(live, lm, ids, text)
        torch.testing.assert_close(along(y), new, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rest(y), rest(x), rtol=1e-4, atol=1e-5)
    assert (along(x) > 0.01).any() and (along(x) < 0.01).any()


def test_layer_norm_saes_steer_in_their_own_units(lm):
    sae, ids = an_sae(normalize_activations="layer_norm"), prompt_ids(lm)
    live, x = InterpretableModel(lm, {HOOK: sae}, special_ids=()), held(lm, ids)
    y = steered(live, lm, ids, "3:+2")
    std = x.std(-1, keepdim=True) + 1e-5
    torch.testing.assert_close(y, x + 2 * std * sae.W_dec[3], rtol=1e-4, atol=1e-5)


def test_transcoders_read_before_and_write_behind_their_module(lm):
    sae, ids = an_sae(transcode=True), prompt_ids(lm)
    hook = "transformer.h.1.mlp"
    live, x, y = InterpretableModel(lm, {hook: sae}, special_ids=()), held(lm, ids, f"{hook}@in"), held(lm, ids, hook)
    f = sae.encode(x)
    i = int((f > 0).sum((0, 1)).argmax())
    stream = held(lm, ids)
    with live.steer(f"{i}:=4"), live.track(latents=[i]) as seen:
        new = held(lm, ids, "transformer.h.2@in")
    torch.testing.assert_close(new - stream, (4 - f[..., i])[..., None] * sae.W_dec[i], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.values(), f[..., [i]], rtol=1e-5, atol=1e-6)
    assert y.shape == x.shape


def test_special_tokens_and_positions(lm):
    tokenizer = lm.tokenizer
    chat = [{"role": "user", "content": PROMPT}]
    ids = torch.tensor([tokenizer.render_chat(chat, reply=True)])
    special = torch.isin(ids, torch.tensor(sorted(tokenizer.special_ids)))
    assert special.any() and not special.all()
    sae = an_sae()
    live, x = InterpretableModel(lm, {HOOK: sae}), held(lm, ids)
    moved = lambda *edits: (steered(live, lm, ids, *edits) != x).any(-1)
    assert torch.equal(moved("3:+5"), ~special)
    assert moved(Edit(3, "add", 5.0, specials=True)).all()
    assert torch.equal(moved("3:+5@prompt"), ~special)
    assert not moved("3:+5@generated").any()


@pytest.mark.parametrize(
    "edit", ["3:+6@prompt", "3:+6@generated", "3:+6", "3:=5", "3:+6?{busy}>0.2", "3:+6@generated?{busy}>0.1"]
)
def test_cache_or_not_the_same_steered_answer(lm, edit):
    ids = prompt_ids(lm, PROMPT, "zeta eta theta iota kappa mu nu")
    sae = an_sae("batchtopk")
    live, busy = InterpretableModel(lm, {HOOK: sae}), int((sae.encode(held(lm, ids)) > 0.2).sum((0, 1)).argmax())
    with live.steer(edit.format(busy=busy)):
        cached = write(lm, ids, 20)
        assert torch.equal(cached, write(lm, ids, 20, use_cache=False))
    assert not torch.equal(cached, write(lm, ids, 20)), "the edit does nothing here"


def test_generated_positions_are_those_behind_the_prompt(lm):
    """With and without a cache, and when a full context slides (the model has 64 positions)."""
    ids, sae = prompt_ids(lm), exact_sae()
    P = ids.shape[1]
    for use_cache in (True, False):
        live = InterpretableModel(lm, {HOOK: sae}, special_ids=())
        with live.steer("5:=77@generated"), live.track(latents=[5]) as seen:
            write(lm, ids, 10, use_cache=use_cache)
            values = seen.values()[0, :, 0]
            assert (values[:P] < 40).all()
            torch.testing.assert_close(values[P:], torch.full_like(values[P:], 77), rtol=1e-4, atol=1e-4)
    with live.steer("5:=77@generated"), live.track(latents=[5]) as seen:
        write(lm, ids, 64 - P + 1, use_cache=False)  # the last forward lost the oldest half, the prompt with it
        assert (write(lm, ids, 64 - P + 3, use_cache=False).shape[1]) == 67
        values = seen.values()[0, :, 0]
        assert len(values) == 33 and (values > 76).all()


def test_conditions_look_at_the_same_token(lm):
    ids = prompt_ids(lm, PROMPT, "zeta eta theta iota kappa mu nu")
    saes = {HOOK: an_sae("relu"), "transformer.h.0": an_sae("relu", seed=9)}
    live, x = InterpretableModel(lm, saes, special_ids=()), held(lm, ids)
    early = saes["transformer.h.0"].encode(held(lm, ids, "transformer.h.0"))
    latent = int(((early > 0.1).float().mean((0, 1)) - 0.5).abs().argmin())
    met = early[..., latent] > 0.1
    assert met.any() and not met.all()
    y = steered(live, lm, ids, f"{HOOK}/3:+5?transformer.h.0/{latent}>0.1")
    assert torch.equal((y != x).any(-1), met)
    with pytest.raises(UserError, match="only after the place"):
        steered(live, lm, ids, f"transformer.h.0/3:+5?{HOOK}/4>0")
    assert n_hooks(lm.module) == 0
    with pytest.raises(UserError, match="there are 2 SAEs; write which one"), live.steer("3:+5"):
        pass


def test_stop_conditions(lm):
    ids = prompt_ids(lm)
    live = InterpretableModel(lm, {HOOK: exact_sae()}, special_ids=())
    with live.track(latents=[5]) as seen:
        text = write(lm, ids, 12)
    new = seen.values()[0, ids.shape[1] :, 0]  # of generated tokens
    above = float(new[:-1].max()) - 1e-3
    first = int((new > above).int().argmax())
    for use_cache in (True, False):
        with live.steer(stop=[f"5>{above}"]) as steering:
            for n, _ in enumerate(lm.module.generate(ids, 12, temperature=0, use_cache=use_cache)):
                assert bool(steering.stopped) == (n > first), n  # the n-th forward has read n generated tokens
            assert bool(steering.stopped)
            logits(lm, prompt_ids(lm, "mu nu xi"))
            assert not bool(steering.stopped), "a new prompt"
    assert text.shape[1] == ids.shape[1] + 12


def test_blocks_nest_in_any_order_and_leave_nothing(lm):
    ids = prompt_ids(lm)
    clean, state = logits(lm, ids), {n: p.clone() for n, p in lm.module.state_dict().items()}
    live = InterpretableModel(lm, {HOOK: an_sae()})
    track, steer = live.track(), live.steer("3:+5")
    seen = track.__enter__()
    steer.__enter__()
    once = logits(lm, ids)
    with live.steer("3:+5"):
        twice = logits(lm, ids)
    with live.steer("3:+10"):
        pass
    track.__exit__(None, None, None)  # the one that began first ends first
    assert torch.equal(logits(lm, ids), once)
    steer.__exit__(None, None, None)
    assert torch.equal(logits(lm, ids), clean)
    assert not torch.equal(once, clean)
    assert not torch.equal(twice, once)
    with live.steer("3:+10"):
        torch.testing.assert_close(logits(lm, ids), twice, rtol=1e-4, atol=1e-4)
    assert seen.features().values.shape[1] == ids.shape[1]
    with pytest.raises(IndexError), live.track(), live.steer("3:+5"):
        logits(lm, torch.full((1, 9), 10**6))
    assert n_hooks(lm.module) == 0
    assert torch.equal(logits(lm, ids), clean)
    assert all(torch.equal(p, state[n]) for n, p in lm.module.state_dict().items())


def test_two_saes_at_one_place(lm):
    ids, a, b = prompt_ids(lm), an_sae(), an_sae("relu", seed=4)
    live, x = InterpretableModel(lm, {f"{HOOK}/k8": a, f"{HOOK}/k16": b}, special_ids=()), held(lm, ids)
    y = steered(live, lm, ids, f"{HOOK}/k8/3:+5", f"{HOOK}/k16/3:+2")
    torch.testing.assert_close(y, x + 5 * a.W_dec[3] + 2 * b.W_dec[3], rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# other models


@pytest.fixture(scope="module")
def gpt2():
    """A HuggingFace GPT-2, tiny and random."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=3, n_head=2, n_embd=32, vocab_size=100, n_positions=64, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0 if p.ndim > 1 else 1.0)
    return model


def hf_write(model, ids, n=12, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mask = torch.ones_like(ids)
        return model.generate(ids, attention_mask=mask, max_new_tokens=n, do_sample=False, eos_token_id=None, **options)


def test_huggingface_generate(gpt2):
    ids = torch.randint(1, 100, (2, 7), generator=torch.Generator().manual_seed(1))
    sae = an_sae("topk")
    live = InterpretableModel(gpt2, {HOOK: sae}, special_ids=[0])
    plain = hf_write(gpt2, ids)
    texts, records = [], []
    for use_cache in (True, False):
        with live.track(top_k=8) as seen:
            assert torch.equal(hf_write(gpt2, ids, use_cache=use_cache), plain)
        with live.steer("3:+9", "5:*0@generated"), live.track(latents=[3]) as some:
            texts.append(hf_write(gpt2, ids, use_cache=use_cache))
        records.append((seen.features().values, some.values()))
    assert records[0][0].shape == (2, plain.shape[1] - 1, 8)
    torch.testing.assert_close(records[0], records[1], rtol=0, atol=1e-5)
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], plain)
    with live.track(latents=[3]) as seen:
        hf_write(gpt2, ids[:1])
    new = seen.values()[0, 7:, 0]
    with live.steer(stop=[f"3>{float(new[:-2].max()) - 1e-4}"]) as steering:
        wants = lambda ids, _: torch.zeros(len(ids), dtype=torch.bool) if steering.stopped is None else steering.stopped
        short = hf_write(gpt2, ids[:1], stopping_criteria=[wants])
    first = int((new > float(new[:-2].max()) - 1e-4).int().argmax())
    assert short.shape[1] == 7 + first + 2  # it is read, and one more is written, before the model is stopped
    assert n_hooks(gpt2) == 0


def test_ids_are_not_mistaken(gpt2):
    """Masks and positions are whole numbers too; a HuggingFace model names its special tokens (here 0)."""
    live, ids = InterpretableModel(gpt2, {HOOK: an_sae()}), torch.tensor([[0, 5, 6, 0, 7]])
    given = {"attention_mask": torch.ones_like(ids), "position_ids": torch.arange(5)[None]}
    moved = lambda **inputs: (held_by(gpt2, live, inputs) != held_by(gpt2, None, inputs)).any(-1)[0].tolist()
    assert moved(**given, input_ids=ids) == [False, True, True, False, True]
    assert moved(**given, inputs_embeds=gpt2.transformer.wte(ids)) == [True] * 5  # which are special nobody knows
    with live.steer("3:+9"), hooks.capture(gpt2, ["transformer.h.2@in"]) as seen:
        gpt2(ids)
    clean = held_by(gpt2, None, {"input_ids": ids})
    assert torch.equal(seen["transformer.h.2@in"][0, [0, 3]], clean[0, [0, 3]])


def held_by(model, live, inputs):
    with hooks.capture(model, ["transformer.h.2@in"]) as seen, live.steer("3:+9") if live else nullcontext():
        model(**inputs)
    return seen["transformer.h.2@in"]


def test_a_prompt_that_goes_on_in_several_ways(gpt2):
    """Its cache, filled once, is repeated for all of them (nanochat's engine does so)."""
    cache = pytest.importorskip("transformers").DynamicCache()
    ids = torch.randint(1, 100, (3, 9), generator=torch.Generator().manual_seed(1))
    ids[:, :7] = ids[0, :7]
    live = InterpretableModel(gpt2, {HOOK: an_sae()})
    with live.track(top_k=4) as seen:
        gpt2(ids[:1, :7], past_key_values=cache)
        cache.batch_repeat_interleave(3)
        for i in (7, 8):
            gpt2(ids[:, i : i + 1], past_key_values=cache)
    with live.track(top_k=4) as whole:
        gpt2(ids)
    torch.testing.assert_close(seen.features().values, whole.features().values, rtol=0, atol=1e-5)


def test_hookpoints_go_by_every_name(gpt2):
    """As SAEs of other libraries call them."""
    ids = torch.tensor([[5, 6, 7]])
    records = []
    for name in (HOOK, "h.1", "blocks.1.hook_resid_post"):
        with InterpretableModel(gpt2, {name: an_sae()}).track() as seen:
            gpt2(ids)
        records.append(seen.features(name).values)
    assert torch.equal(records[0], records[1]) and torch.equal(records[0], records[2])


def test_a_plain_module():
    """No ids, no positions, no cache: rows of activations."""
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 3))
    sae, x = an_sae(), torch.randn(10, 6, generator=g)
    live = InterpretableModel(model, {"1": sae})
    clean = model(x)
    with live.track(top_k=4) as seen:
        assert torch.equal(live(x), clean)
    h = model[1](model[0](x))
    assert seen.features().values.shape == (10, 4)
    torch.testing.assert_close(seen.features().values, sae.encode(h).topk(4).values, rtol=1e-5, atol=1e-6)
    with live.steer("3:=2", "4:+1@generated"):  # which of the rows is generated nobody knows: all are edited
        y = model(x)
    want = model[2](h + (2 - sae.encode(h)[:, 3:4]) * sae.W_dec[3] + sae.W_dec[4])
    torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)


def test_gradients_still_flow(gpt2):
    live = InterpretableModel(gpt2, {HOOK: an_sae()})
    x = gpt2.transformer.wte(torch.tensor([[1, 2, 3]])).detach().requires_grad_()
    with live.track(), live.steer("3:=2"):
        gpt2(inputs_embeds=x).logits.sum().backward()
    assert x.grad.abs().sum() > 0


# ----------------------------------------------------------------------------------------------------------------------
# text


def test_what_cannot_be_is_said(lm):
    with pytest.raises(UserError, match="no module"):
        InterpretableModel(lm, {"transformer.h.7": an_sae()})
    with pytest.raises(UserError, match="no SAE was given"):
        InterpretableModel(lm, {})
    live = InterpretableModel(lm, {HOOK: an_sae()})
    with pytest.raises(UserError, match="0 to 95"), live.steer("96:+1"):
        pass
    with pytest.raises(UserError, match="not known"), live.steer("9:+1max"):
        pass
    with pytest.raises(UserError, match="no latent was given"), live.track(latents=[]):
        pass
    with pytest.raises(UserError, match=r"\(96,\) was wanted"):
        InterpretableModel(lm, {HOOK: an_sae()}, max_activations={HOOK: torch.ones(3)})
    wide = InterpretableModel(lm, {HOOK: an_sae(d=48)})
    with pytest.raises(UserError, match="48"), wide.track():
        logits(lm, prompt_ids(lm))
    assert n_hooks(lm.module) == 0


@pytest.mark.filterwarnings("ignore")
def test_compiled_models_are_refused():
    """They would go on as if nothing were watched or steered."""
    plain, inside, at = nn.Sequential(nn.Linear(32, 32)), nn.Sequential(nn.Linear(32, 32)), {"0": an_sae()}
    InterpretableModel(inside, at)
    inside[0].compile()
    for compiled in (torch.compile(plain), nn.Sequential(torch.compile(plain)), inside):
        with pytest.raises(UserError, match="uncompiled"):
            InterpretableModel(compiled, at)
