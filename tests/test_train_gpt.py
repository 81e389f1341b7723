"""The small GPT is nanoGPT's: names, checkpoints and logits agree with it and with HuggingFace, training is
reproducible (resumed, accumulated or spread over ranks), and broken or hostile files end in one sentence.

    python -m pytest tests/test_train_gpt.py
"""

from __future__ import annotations

import importlib
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sample
import tokenizer as tokenizer_py
import train
from model import GPT, GPTConfig, read_checkpoint, save_atomic
from tests.conftest import ROOT
from tokenizer import CHAT_TOKENS, BPETokenizer, CharTokenizer, load_tokenizer
from train import Place, Run, TrainConfig, Validation, lr_at, open_data, validate

corpus = importlib.import_module("assets.pygpt.corpus")  # by name: mypy sees that file as a script

CPU = Place(0, 1, torch.device("cpu"))
TINY = GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=3, n_embd=24)
FUNCTION = """def f{i}(x, y={i}):
    '''Add {i} to x, na\u00efvely \u2192 \U0001f642.'''
    return x + {i} * y


"""
TEXT = "".join(FUNCTION.replace("{i}", str(i)) for i in range(120))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Models this small lose more to threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bpe() -> BPETokenizer:
    return BPETokenizer.train([TEXT], 330)


@pytest.fixture(scope="module")
def data_dir(bpe, tmp_path_factory) -> Path:
    """A nanoGPT data folder: documents of TEXT, each behind a bos."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    bpe.save(folder / "tokenizer.json")
    docs = TEXT.split("\n\n\n")
    for split, part in (("train", docs[:100]), ("val", docs[100:])):
        ids = [i for doc in part for i in bpe.encode_document(doc)]
        np.array(ids, dtype=np.uint16).tofile(folder / f"{split}.bin")
    return folder


def flags(data_dir: Path, out_dir: Path, /, **changes) -> list[str]:
    """The command line of a run that takes about a second."""
    knobs = {
        "data_dir": data_dir,
        "out_dir": out_dir,
        "device": "cpu",
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 32,
        "block_size": 32,
        "batch_size": 8,
        "max_steps": 6,
        "lr_decay_steps": 6,
        "warmup_steps": 2,
        "log_every": 1,
        "eval_every": 3,
        **changes,
    }
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in knobs.items()]


def metrics(out_dir: Path, *keys: str) -> list[tuple]:
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[key] for key in keys) for line in lines if keys[-1] in line]


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("out") / "trained"
    knobs = {"max_steps": 60, "lr_decay_steps": 60, "learning_rate": 1e-2, "min_lr": 1e-3, "eval_every": 20}
    assert train.main(flags(data_dir, out, **knobs)) == 0
    return out


def random_model(config: GPTConfig = TINY, scale: float = 5.0) -> GPT:
    """Larger weights than at the start of a training run, so that every part of the model shows in the logits."""
    model = GPT(config, generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim < 2:
                p.add_(0.1 * torch.arange(p.numel()).cos())
            elif "wte" not in name:
                p.mul_(scale)
    return model


def random_ids(*shape: int, vocab_size: int = 50) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


def refused(error: type[Exception], call, *args) -> str:
    """Return the one sentence that a call fails with."""
    with pytest.raises(error) as info:
        call(*args)
    assert "\n" not in str(info.value) and len(str(info.value)) < 600
    return str(info.value)


# ---- The model is nanoGPT ----------------------------------------------------------------------------------
def nanogpt_shapes(c: GPTConfig) -> list[tuple[str, tuple[int, ...]]]:
    """The state dict of nanoGPT's model.py, in its order, which its optimiser's state depends on."""
    C = c.n_embd
    shapes: list[tuple[str, tuple[int, ...]]] = [
        ("transformer.wte.weight", (c.vocab_size, C)),
        ("transformer.wpe.weight", (c.block_size, C)),
    ]
    for i in range(c.n_layer):
        for name, shape in (
            ("ln_1", (C,)),
            ("attn.c_attn", (3 * C, C)),
            ("attn.c_proj", (C, C)),
            ("ln_2", (C,)),
            ("mlp.c_fc", (4 * C, C)),
            ("mlp.c_proj", (C, 4 * C)),
        ):
            shapes.append((f"transformer.h.{i}.{name}.weight", shape))
            if c.bias:
                shapes.append((f"transformer.h.{i}.{name}.bias", shape[:1]))
    shapes.append(("transformer.ln_f.weight", (C,)))
    if c.bias:
        shapes.append(("transformer.ln_f.bias", (C,)))
    return [*shapes, ("lm_head.weight", (c.vocab_size, C))]


def nanogpt_forward(w: dict[str, torch.Tensor], args: dict, ids: torch.Tensor) -> torch.Tensor:
    """nanoGPT's forward, written out once more: no module, no fused kernel, nothing of model.py."""

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    B, T = ids.shape
    H, C = args["n_head"], args["n_embd"]
    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][:T]
    for i in range(args["n_layer"]):
        h = f"transformer.h.{i}"
        qkv = linear(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn")
        q, k, v = (y.reshape(B, T, H, C // H).transpose(1, 2) for y in qkv.split(C, dim=-1))
        att = q @ k.transpose(-2, -1) / math.sqrt(C // H)
        att = att.masked_fill(torch.triu(torch.ones(T, T), 1) > 0, -math.inf).softmax(-1)
        x = x + linear((att @ v).transpose(1, 2).reshape(B, T, C), f"{h}.attn.c_proj")
        y = linear(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")
        x = x + linear(y * 0.5 * (1 + torch.erf(y / math.sqrt(2))), f"{h}.mlp.c_proj")
    return linear(norm(x, "transformer.ln_f"), "lm_head")


@pytest.mark.parametrize("bias", [True, False])
def test_names_and_shapes_are_nanogpts(bias):
    config = GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=3, n_embd=24, bias=bias)
    model = GPT(config)
    assert [(name, tuple(p.shape)) for name, p in model.state_dict().items()] == nanogpt_shapes(config)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert list(config.model_args()) == ["block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias"]
    names = dict(model.named_modules())
    assert {"transformer.drop", "transformer.h.1.attn.attn_dropout", "transformer.h.1.mlp.gelu"} <= names.keys()


def test_optimizer_decays_matrices_only():
    model = GPT(TINY)
    decayed, rest = model.configure_optimizer(learning_rate=1e-3, weight_decay=0.1).param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in rest["params"]} == {1}
    assert len(decayed["params"]) + len(rest["params"]) == len(list(model.parameters()))


def test_targets_of_minus_one_do_not_count():
    model, ids = random_model(), random_ids(2, 9)
    targets = ids.roll(-1, 1)
    targets[0, 3:] = -1
    logits, loss = model(ids, targets)
    logp = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    assert loss.item() == pytest.approx(-logp[targets >= 0].mean().item(), rel=1e-5)


def test_cache_in_chunks_gives_the_same_logits():
    model, ids = random_model(), random_ids(3, 16)
    whole = model(ids)[0]
    cache, parts = model.new_cache(3), []
    for chunk in ids.split([1, 4, 1, 1, 6, 3], dim=1):
        parts.append(model(chunk, cache=cache)[0])
    assert cache.length == 16
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-4)
    assert "block_size=16" in refused(ValueError, lambda: model(ids[:, :1], cache=cache))


def test_a_forward_cut_short_leaves_the_cache():
    model, ids = random_model(), random_ids(1, 6)
    cache = model.new_cache()
    model(ids[:, :4], cache=cache)

    def stop(*_):
        raise KeyboardInterrupt

    handle = model.transformer.h[1].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, 4:], cache=cache)
    handle.remove()
    torch.testing.assert_close(model(ids[:, 4:], cache=cache)[0], model(ids)[0][:, 4:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generate_past_the_context_needs_no_cache(temperature):
    model, ids = random_model(), random_ids(2, 5)

    def run(use_cache):
        how = {"temperature": temperature, "top_k": 7, "generator": torch.Generator().manual_seed(3)}
        return torch.cat(list(model.generate(ids, 50, use_cache=use_cache, **how)), 1)

    cached, free = run(True), run(False)
    assert cached.shape == (2, 50) and torch.equal(cached, free)
    if temperature == 0:  # the window, by hand: a full context loses its oldest half
        window = ids
        for t in range(50):
            window = window[:, -8:] if window.shape[1] > 16 else window
            best = model(window)[0][:, -1].argmax(-1, keepdim=True)
            assert torch.equal(best, free[:, t : t + 1])
            window = torch.cat((window, best), 1)


def test_generate_stops_row_by_row():
    model, ids = random_model(), random_ids(3, 4)

    def run(stop_ids):
        return torch.cat(
            list(model.generate(ids, 40, generator=torch.Generator().manual_seed(0), stop_ids=stop_ids)), 1
        )

    free = run(())
    stop = int(free[0, 2])
    ends = [row.index(stop) if stop in row else 39 for row in free.tolist()]
    assert max(ends) > min(ends) + 2  # else this test says nothing
    out = run({stop})
    assert out.shape[1] == max(ends) + 1
    for row, full, end in zip(out.tolist(), free.tolist(), ends, strict=True):
        assert row[: end + 1] == full[: end + 1] and set(row[end:]) == {full[end]}
    for bad in ({"temperature": -1.0}, {"top_k": 0}):
        refused(ValueError, lambda bad=bad: next(model.generate(ids, 1, **bad)))
    refused(ValueError, lambda: next(model.generate(ids[:, :0], 1)))


def test_top_k_draws_from_the_best_only():
    model, ids = random_model(), random_ids(1, 4).expand(300, 4)
    best = set(model(ids[:1])[0][0, -1].topk(3).indices.tolist())
    drawn = next(model.generate(ids, 1, temperature=2.0, top_k=3, generator=torch.Generator().manual_seed(0)))
    assert set(drawn.flatten().tolist()) == best


# ---- Checkpoints -------------------------------------------------------------------------------------------
def test_checkpoint_round_trip_is_bit_equal(data_dir, tmp_path):
    config = train.parse_config(flags(data_dir, tmp_path))
    run = Run(config, CPU, open_data(config, CPU))
    for _ in range(3):
        run.train_step()
    run.save(Validation(1.0, 1.0))
    ids = random_ids(2, 32)
    trained_logits = run.model.eval()(ids)[0]
    read = GPT.from_checkpoint(tmp_path)
    assert torch.equal(read(ids)[0], trained_logits) and not read.training
    assert read.lm_head.weight is read.transformer.wte.weight and read.lm_head.weight.requires_grad
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)  # as nanoGPT's own sample.py and torch do
    assert checkpoint.keys() >= {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}
    assert (checkpoint["iter_num"], checkpoint["config"]["dataset"]) == (3, "tiny")
    weights = checkpoint["model"]
    assert weights["lm_head.weight"].data_ptr() == weights["transformer.wte.weight"].data_ptr()  # stored once
    other = nanogpt_forward(weights, checkpoint["model_args"], ids)
    torch.testing.assert_close(other, trained_logits, atol=1e-5, rtol=1e-5)


def test_best_weights_outlive_worse_ones(data_dir, tmp_path):
    config = train.parse_config(flags(data_dir, tmp_path))
    data = open_data(config, CPU)
    run = Run(config, CPU, data)
    for loss in (2.0, 3.0):
        run.train_step()
        run.save(Validation(loss, loss))
    resumed = Run(train.parse_config(["--resume", "--out_dir", str(tmp_path)]), CPU, data)
    assert (resumed.step, resumed.best) == (2, 2.0)
    resumed.save(Validation(2.5, 2.5))
    best, latest = read_checkpoint(tmp_path / "best.pt"), read_checkpoint(tmp_path)
    assert (best["iter_num"], latest["iter_num"], latest["best_val_loss"]) == (1, 2, 2.0)
    assert best["optimizer"] is None


@pytest.mark.parametrize("bias", [True, False])
def test_logits_are_nanogpts_with_large_weights(bias):
    config = GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=3, n_embd=24, bias=bias)
    model, ids = random_model(config), random_ids(2, 16)
    other = nanogpt_forward(model.state_dict(), config.model_args(), ids)
    torch.testing.assert_close(model(ids)[0], other, atol=1e-4, rtol=1e-4)


def test_prefixes_and_masks_of_other_savers(tmp_path):
    model, ids = random_model(), random_ids(1, 8)
    checkpoint = model.to_checkpoint()
    renamed = {f"_orig_mod.module.{name}": w for name, w in checkpoint["model"].items()}
    renamed["transformer.h.0.attn.bias"] = torch.ones(1, 1, 16, 16).tril()  # nanoGPT's mask, in old versions
    save_atomic({**checkpoint, "model": renamed, "best_val_loss": torch.tensor(1.5)}, tmp_path / "ckpt.pt")
    assert torch.equal(GPT.from_checkpoint(tmp_path)(ids)[0], model(ids)[0])


def test_export_is_small_and_knows_no_paths(trained, tmp_path, capsys):
    file = tmp_path / "assets" / "ckpt.pt"
    assert train.main(["--export", str(file), "--out_dir", str(trained)]) == 0
    exported = read_checkpoint(file)
    assert {w.dtype for w in exported["model"].values()} == {torch.bfloat16} and exported["optimizer"] is None
    assert str(trained.parent) not in str(exported["config"]) and exported["config"]["dataset"] == "tiny"
    best, model = GPT.from_checkpoint(trained / "best.pt"), GPT.from_checkpoint(file)
    for a, b in zip(best.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.to(torch.bfloat16).float(), b)
    assert "bytes" in capsys.readouterr().out


class Evil:
    """Unpickling it leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_hostile_pickles_do_not_run(tmp_path):
    marker = tmp_path / "marker"
    bomb = pickle.dumps({"vocab_size": Evil(marker), "model": {}, "model_args": {}})
    pickle.loads(bomb)  # the bomb works: this is what must not happen
    assert marker.exists()
    marker.unlink()
    (tmp_path / "meta.pkl").write_bytes(bomb)
    (tmp_path / "raw.pt").write_bytes(bomb)
    torch.save({"model": Evil(marker), "model_args": {}}, tmp_path / "zip.pt")
    assert "refused" in refused(ValueError, load_tokenizer, tmp_path / "meta.pkl")
    for name in ("zip.pt", "raw.pt"):
        refused(ValueError, GPT.from_checkpoint, tmp_path / name)
    assert "refused" in refused(ValueError, GPT.from_checkpoint, tmp_path / "zip.pt")
    assert not marker.exists()


def test_broken_checkpoints_end_in_one_sentence(tmp_path):
    good = random_model().to_checkpoint()
    file = tmp_path / "ckpt.pt"
    save_atomic(good, file)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        save_atomic({**good, "config": {"x": lambda: 0}}, file)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt.pt"]  # no temporary file, whole or half
    GPT.from_checkpoint(file)  # and the old one is whole
    whole = file.read_bytes()
    cuts = [whole[:n] for n in (0, 1, 100, len(whole) // 2, len(whole) - 30)]
    for content in (*cuts, b"<html>", b"{}", b"\x80"):
        file.write_bytes(content)
        message = refused(ValueError, GPT.from_checkpoint, file)
        assert "truncated" in message and str(file) in message
    assert "no such" in refused(FileNotFoundError, GPT.from_checkpoint, tmp_path / "none.pt")
    assert "no such" in refused(FileNotFoundError, GPT.from_checkpoint, tmp_path / "none")

    weights, args = good["model"], good["model_args"]
    key = "transformer.h.1.mlp.c_fc.weight"
    for content, word in (
        ({**good, "model": {k: w for k, w in weights.items() if k != key}}, key),
        ({**good, "model": {**weights, "transformer.h.9.x": weights[key]}}, "transformer.h.9.x"),
        ({**good, "model": {**weights, key: weights[key][:-1]}}, key),
        ({**good, "model": {**weights, key: "text"}}, key),
        ({**good, "model": {**weights, 3: weights[key]}}, "3"),
        ({**good, "model": {**weights, "lm_head.weight": weights["lm_head.weight"] + 1}}, "lm_head"),
        ({**good, "model_args": {**args, "n_embd": 48}}, "29 weights"),
        ({**good, "model_args": {**args, "n_head": 5}}, "n_head"),
        ({**good, "model_args": {**args, "n_layer": "2"}}, "n_layer"),
        ({**good, "model_args": {**args, "n_kv_head": 2}}, "n_kv_head"),
        ({**good, "model_args": {k: v for k, v in args.items() if k != "n_head"}}, "n_head"),
        ({"model": weights}, "model_args"),
        ([1, 2], "model"),
    ):
        torch.save(content, file)
        assert word in refused(ValueError, GPT.from_checkpoint, file)


# ---- HuggingFace -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    """Save a random GPT-2 to disk; a function of the changes to its config."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def make(**changes):
        knobs = {"vocab_size": 50, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 3, **changes}
        torch.manual_seed(0)
        hf = GPT2LMHeadModel(GPT2Config(**knobs, initializer_range=0.2, bos_token_id=0, eos_token_id=0)).eval()
        with torch.no_grad():
            for name, p in hf.named_parameters():
                if name.endswith("bias"):
                    p += 0.1 * torch.arange(p.numel()).cos()
        folder = tmp_path_factory.mktemp("hf")
        hf.save_pretrained(folder)
        return folder, hf

    return make


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_logits_are_huggingfaces(hf_folder, activation, tmp_path):
    folder, hf = hf_folder(activation_function=activation)
    model, ids = GPT.from_hf(folder), random_ids(2, 16)
    torch.testing.assert_close(model(ids)[0], hf(ids).logits, atol=1e-4, rtol=1e-4)
    save_atomic(model.to_checkpoint(), tmp_path / "ckpt.pt")
    assert torch.equal(GPT.from_checkpoint(tmp_path)(ids)[0], model(ids)[0])  # gelu is kept
    assert ("gelu" in model.config.model_args()) == (activation == "gelu_new")


def test_what_gpt_cannot_express_is_refused(hf_folder, tmp_path):
    for knobs in ({"n_inner": 50}, {"layer_norm_epsilon": 1e-6}, {"scale_attn_by_inverse_layer_idx": True}):
        assert next(iter(knobs)) in refused(ValueError, GPT.from_hf, hf_folder(**knobs)[0])
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "bert" in refused(ValueError, GPT.from_hf, tmp_path)
    assert "no HuggingFace" in refused(FileNotFoundError, GPT.from_hf, tmp_path / "none")


def test_half_a_huggingface_model_is_refused(hf_folder):
    from safetensors.torch import load_file, save_file

    folder = hf_folder()[0]
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file({k: w for k, w in weights.items() if "h.1.mlp.c_fc.bias" not in k}, file, {"format": "pt"})
    assert "h.1.mlp.c_fc.bias" in refused(ValueError, GPT.from_hf, folder)
    file.write_bytes(file.read_bytes()[:-100])
    refused(ValueError, GPT.from_hf, folder)


# ---- Tokenizers --------------------------------------------------------------------------------------------
SOURCE_LIKE = st.text(alphabet="ab_Z .\n\t\r()=0189'\u00e9\u0301\u6f22\U0001f642\u2028\x1c\x00", max_size=80)


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60) | SOURCE_LIKE)
def test_bpe_loses_nothing(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert b"".join(bpe.token_bytes(i) for i in ids) == text.encode()
    assert not bpe.special_ids & set(ids)


@settings(max_examples=60, deadline=None)
@given(words=st.dictionaries(st.text(alphabet="ab\u00e9", min_size=1, max_size=9), st.integers(1, 5), max_size=8))
def test_bpe_training_equals_plain_recounting(words):
    tokens, spelled = [bytes([b]) for b in range(256)], [[*word.encode()] for word in words]
    for _ in range(12):
        counts: Counter[tuple[int, int]] = Counter()
        for word, n in zip(spelled, words.values(), strict=True):
            for pair in zip(word, word[1:], strict=False):
                counts[pair] += n
        if not counts or len(tokens) == 264:
            break
        pair = min(counts, key=lambda p: (-counts[p], p))
        token = tokens[pair[0]] + tokens[pair[1]]
        if token not in tokens:
            tokens.append(token)
        for w, word in enumerate(spelled):
            new, i = [], 0
            while i < len(word):
                hit = tuple(word[i : i + 2]) == pair
                new.append(tokens.index(token) if hit else word[i])
                i += 2 if hit else 1
            spelled[w] = new
    learned = tokenizer_py._learn_merges(words, 8)
    assert learned[: len(tokens)] == tokens[: len(learned)]


def test_bpe_is_deterministic_and_compresses(bpe, tmp_path):
    assert bpe.vocab_size == 330 and len(bpe.encode(TEXT)) < len(TEXT.encode()) / 2
    assert BPETokenizer.train([TEXT], 330).content_hash() == bpe.content_hash()
    bpe.save(tmp_path / "tokenizer.json")
    read = load_tokenizer(tmp_path)
    assert read.content_hash() == bpe.content_hash() and read.encode(TEXT) == bpe.encode(TEXT)
    assert BPETokenizer.train(["abab"], 5000).vocab_size < 270  # runs out of pairs
    refused(ValueError, BPETokenizer.train, ["x"], 260)


def test_bpe_survives_a_million_spaces(bpe):
    text = " " * 1_000_001 + "x" + "\n" * 10
    assert bpe.decode(bpe.encode(text)) == text


def test_special_strings_in_text_stay_text(bpe):
    text = " ".join(CHAT_TOKENS)
    assert not bpe.special_ids & set(bpe.encode(text)) and bpe.decode(bpe.encode(text)) == text
    ids = bpe.render_chat([{"role": "user", "content": text}, {"role": "assistant", "content": text}])
    names = {i: name for name, i in bpe.specials.items()}
    assert [names[i] for i in ids if i in names] == list(CHAT_TOKENS)
    bos, user_start, user_end, start, end = CHAT_TOKENS
    assert bpe.decode(ids) == bos + user_start + text + user_end + start + text + end


def test_chat_template(bpe):
    user, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}
    bos, user_start, user_end, start, end = (bpe.specials[name] for name in CHAT_TOKENS)
    (x,), (y,) = bpe.encode("x"), bpe.encode("y")
    assert bpe.render_chat([user, answer]) == [bos, user_start, x, user_end, start, y, end]
    assert bpe.render_chat([user], reply=True) == [bos, user_start, x, user_end, start]
    assert bpe.render_chat([user, answer], reply=True) == [bos, user_start, x, user_end, start, y]
    assert bpe.encode_document([user, answer]) == bpe.render_chat([user, answer])
    system = {"role": "system", "content": "be kind"}
    asked = {"role": "user", "content": "be kind\n\nx"}
    assert bpe.render_chat([system, user, answer]) == bpe.render_chat([asked, answer])
    assert bpe.render_chat([system, answer]) == bpe.render_chat([{**system, "role": "user"}, answer])
    assert bpe.encode_document("x") == [bos, x]
    plain = BPETokenizer(bpe.pattern, bpe.ranks, [])
    assert plain.bos_id is None and plain.decode(plain.render_chat([user], reply=True)) == "user: x\nassistant:"
    refused(ValueError, bpe.render_chat, [{"role": "tool", "content": "x"}])
    refused(ValueError, bpe.render_chat, [{"role": "user"}])


def test_token_str_shows_partial_utf8(bpe):
    assert bpe.token_str(0xE9) == "\\xe9" and bpe.token_str(ord("a")) == "a"
    assert bpe.token_str(bpe.specials["<|bos|>"]) == "<|bos|>"
    for id in (-1, 330):
        refused(ValueError, bpe.token_bytes, id)


def test_broken_tokenizer_files(bpe, tmp_path):
    bpe.save(tmp_path / "good.json")
    file, good = tmp_path / "tokenizer.json", json.loads((tmp_path / "good.json").read_text())
    for content in (
        "",
        "[]",
        "{}",
        json.dumps(good)[:-9],
        "[" * 100_000,
        json.dumps({**good, "ranks": good["ranks"][1:]}),
        json.dumps({**good, "ranks": [*good["ranks"], good["ranks"][0]]}),
        json.dumps({**good, "special_tokens": "abc"}),
        json.dumps({**good, "special_tokens": ["<|x|>", "<|x|>"]}),
        json.dumps({**good, "pattern": None}),
    ):
        file.write_text(content)
        assert str(file) in refused(ValueError, load_tokenizer, file)
    refused(ValueError, load_tokenizer, tmp_path / "none")


def test_char_tables_of_nanogpt(tmp_path):
    chars = sorted({*"To be, or not to be\n\u00e9"})
    meta: dict = {"vocab_size": len(chars), "itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    file = tmp_path / "meta.pkl"
    file.write_bytes(pickle.dumps(meta))
    table = load_tokenizer(tmp_path)
    assert isinstance(table, CharTokenizer) and table.vocab_size == len(chars)
    assert (
        table.encode("be\n") == [meta["stoi"][c] for c in "be\n"] and table.decode(table.encode("b\u00e9")) == "b\u00e9"
    )
    assert table.bos_id is None and not table.special_ids and table.encode_document("To") == table.encode("To")
    assert "'x'" in refused(ValueError, table.encode, "x")
    whole = pickle.dumps(meta)
    swapped = {**meta["stoi"], chars[0]: 1, chars[1]: 0}
    for content in (
        b"",
        whole[:-5],
        b"text",
        pickle.dumps([1]),
        pickle.dumps({**meta, "vocab_size": 3}),
        pickle.dumps({**meta, "stoi": swapped}),
        pickle.dumps({**meta, "itos": {}}),
        pickle.dumps({**meta, "itos": {**meta["itos"], 0: "ab"}}),
        pickle.dumps({**meta, "extra": Path("x")}),
    ):
        file.write_bytes(content)
        assert str(file) in refused(ValueError, load_tokenizer, tmp_path)


# ---- Training ----------------------------------------------------------------------------------------------
def test_lr_schedule():
    config = TrainConfig(max_steps=110, warmup_steps=10, learning_rate=1.0, min_lr=0.1)
    assert lr_at(0, config) == pytest.approx(0.1) and lr_at(4, config) == pytest.approx(0.5)
    assert lr_at(9, config) == lr_at(10, config) == pytest.approx(1.0)
    assert lr_at(60, config) == pytest.approx(0.55)  # half way down the cosine
    assert lr_at(110, config) == lr_at(10_000, config) == pytest.approx(0.1)
    rates = [lr_at(step, config) for step in range(10, 111)]
    assert rates == sorted(rates, reverse=True)
    assert lr_at(0, TrainConfig(warmup_steps=0, learning_rate=1.0)) == pytest.approx(1.0)


def test_training_learns(trained):
    losses = [loss for _, loss in metrics(trained, "step", "val_loss")]
    assert [step for step, _ in metrics(trained, "step", "val_loss")] == [20, 40, 60]
    assert metrics(trained, "step", "loss")[0][1] == pytest.approx(math.log(330), abs=0.1)  # starts uniform
    assert losses[-1] < 0.5 * math.log(330) and losses[-1] < losses[0]
    assert read_checkpoint(trained)["best_val_loss"] == min(losses)


def same_checkpoint(a: dict, b: dict) -> bool:
    weights = all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    states = zip(a["optimizer"]["state"].values(), b["optimizer"]["state"].values(), strict=True)
    return weights and all(torch.equal(x[k], y[k]) for x, y in states for k in x)


def test_resumed_run_is_bitwise_the_same(data_dir, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(flags(data_dir, whole, dropout=0.2)) == 0
    assert train.main(flags(data_dir, parts, dropout=0.2, max_steps=3)) == 0
    with (parts / "metrics.jsonl").open("a") as file:  # what a crash after the checkpoint leaves behind
        file.write('{"step": 4, "loss": 9.0}\n{"step": 5, "lo')
    assert train.main(["--resume", "--out_dir", str(parts), "--max_steps", "6"]) == 0
    a, b = read_checkpoint(whole), read_checkpoint(parts)
    assert a["iter_num"] == b["iter_num"] == 6 and a["best_val_loss"] == b["best_val_loss"]
    assert same_checkpoint(a, b)
    # A session's first step has no line: it would have had to wait for itself.
    assert set(metrics(parts, "step", "loss")) <= set(metrics(whole, "step", "loss"))
    assert metrics(parts, "step", "val_loss") == metrics(whole, "step", "val_loss")
    other = tmp_path / "other"
    assert train.main(flags(data_dir, other, dropout=0.2, seed=7)) == 0
    assert not same_checkpoint(a, read_checkpoint(other))


def test_resume_from_nanogpts_own_checkpoint(data_dir, tmp_path, capsys):
    assert train.main(flags(data_dir, tmp_path, max_steps=3)) == 0
    checkpoint = read_checkpoint(tmp_path)
    del checkpoint["scaler"]
    save_atomic({**checkpoint, "best_val_loss": torch.tensor(2.5)}, tmp_path / "ckpt.pt")
    assert train.main(["--resume", "--out_dir", str(tmp_path), "--max_steps", "4"]) == 0
    save_atomic({**checkpoint, "optimizer": None}, tmp_path / "ckpt.pt")
    for argv, word in ((["--max_steps", "5"], "no optimiser"), (["--n_layer", "3"], "n_layer")):
        capsys.readouterr()
        assert train.main(["--resume", "--out_dir", str(tmp_path), *argv]) == 2
        assert word in capsys.readouterr().err


def test_accumulated_gradients_equal_the_whole_batch(data_dir, tmp_path):
    ends = []
    for name, micro in (("whole", None), ("parts", 2)):
        config = train.parse_config(flags(data_dir, tmp_path / name, micro_batch_size=micro))
        run = Run(config, CPU, open_data(config, CPU))
        loss = [run.train_step().item() for _ in range(4)]
        ends.append((loss, run.model.state_dict()))
    assert ends[0][0] == pytest.approx(ends[1][0], abs=1e-5)
    for name, w in ends[0][1].items():
        torch.testing.assert_close(w, ends[1][1][name], atol=1e-5, rtol=0, msg=name)


# What train.py does, and which of gloo's threads are left: one that frees a tensor while Python ends aborts it.
THREADS_LEFT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import train
from pathlib import Path
code = train.main()
left = [t for t in Path("/proc/self/task").glob("*/comm") if "gloo" in t.read_text()]
sys.exit(f"threads left: {{left}}" if left else code)
"""


def test_two_ranks_equal_one(data_dir, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert train.main(flags(data_dir, one)) == 0
    (tmp_path / "threads_left.py").write_text(THREADS_LEFT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(tmp_path / "threads_left.py"), *flags(data_dir, two, micro_batch_size=2)]
    result = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    a, b = read_checkpoint(one), read_checkpoint(two)
    for name, w in a["model"].items():
        torch.testing.assert_close(w, b["model"][name], atol=1e-5, rtol=0, msg=name)
    for key in ("loss", "val_loss", "val_bits_per_byte"):
        ones, twos = metrics(one, "step", key), metrics(two, "step", key)
        assert len(ones) == len(twos) > 0 and np.allclose(ones, twos, atol=1e-5)


def test_half_precision_on_the_cpu(data_dir, tmp_path):
    dtype = "float16"
    try:
        with torch.autocast("cpu", dtype=torch.float16):
            torch.nn.Linear(4, 4)(torch.ones(2, 4)).sum().backward()
    except RuntimeError:
        dtype = "bfloat16"  # this torch has no fp16 on CPUs
    assert train.main(flags(data_dir, tmp_path, dtype=dtype, max_steps=3)) == 0
    scaler = read_checkpoint(tmp_path)["scaler"]
    assert bool(scaler) == (dtype == "float16")
    assert train.main(["--resume", "--out_dir", str(tmp_path), "--max_steps", "5"]) == 0
    checkpoint = read_checkpoint(tmp_path)
    if scaler:
        assert checkpoint["scaler"]["_growth_tracker"] == scaler["_growth_tracker"] + 2
    assert {w.dtype for w in checkpoint["model"].values()} == {torch.float32}
    assert all(math.isfinite(loss) for _, loss in metrics(tmp_path, "step", "loss"))


def test_uniform_model_costs_log2_v_bits_per_token(data_dir, bpe):
    config = TrainConfig(data_dir=str(data_dir), block_size=32, n_layer=1, n_head=1, n_embd=8)
    data = open_data(config, CPU)
    model = GPT(config.gpt(bpe.vocab_size))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    targets = data.val[1:].tolist()
    n_bytes = len(b"".join(bpe.token_bytes(i) for i in targets if i not in bpe.special_ids))
    loss, bits = validate(model, data, config, CPU)
    assert loss == pytest.approx(math.log(bpe.vocab_size), rel=1e-6)
    assert bits == pytest.approx(math.log2(bpe.vocab_size) * len(targets) / n_bytes, rel=1e-6)


@pytest.mark.parametrize("eval_tokens", [None, 100])
def test_validation_counts_every_token_once(data_dir, bpe, eval_tokens):
    config = TrainConfig(data_dir=str(data_dir), block_size=32, n_embd=24, n_head=3, eval_tokens=eval_tokens)
    data = open_data(config, CPU)
    model = random_model(config.gpt(bpe.vocab_size)).train()
    found = validate(model, data, config, CPU, batch=3)
    assert model.training and found == pytest.approx(validate(model, data, config, CPU, batch=100), rel=1e-6)
    ids = torch.from_numpy(data.val.astype(np.int64))[: 1 + (eval_tokens or len(data.val))]
    nats = 0.0
    for i in range(0, len(ids) - 1, 32):
        window = ids[i : i + 33]
        logp = model.eval()(window[None, :-1])[0][0].log_softmax(-1)
        nats -= logp.gather(-1, window[1:, None]).sum().item()
    assert found.loss == pytest.approx(nats / (len(ids) - 1), rel=1e-5)


def test_a_diverging_run_ends_before_it_saves(data_dir, tmp_path, capsys):
    knobs = {"learning_rate": 1e30, "min_lr": 1e30, "clip_norm": None, "warmup_steps": 0}
    assert train.main(flags(data_dir, tmp_path, **knobs)) == 2
    assert "lower --learning_rate" in capsys.readouterr().err and not (tmp_path / "ckpt.pt").exists()


def test_time_limit_saves(data_dir, tmp_path):
    assert train.main(flags(data_dir, tmp_path, time_limit_s=0, max_steps=50)) == 0
    assert read_checkpoint(tmp_path)["iter_num"] == 2  # the first step that has a line to write


def test_ctrl_c_saves_the_step_it_ends(data_dir, tmp_path, monkeypatch, capsys):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a script ignores it
    assert train.main(flags(data_dir, tmp_path / "whole", max_steps=12)) == 0
    step, argv = train.Run.train_step, flags(data_dir, tmp_path / "cut", max_steps=12)

    def interrupted(run):
        if run.step == 6:
            signal.raise_signal(signal.SIGINT)
        return step(run)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "train_step", interrupted)
        assert train.main(argv) == 130
    assert "stopped after step 7, which is saved; --resume" in capsys.readouterr().err
    assert read_checkpoint(tmp_path / "cut")["iter_num"] == 7
    assert train.main([*argv, "--resume"]) == 0
    whole, cut = (read_checkpoint(tmp_path / name)["model"] for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    monkeypatch.setattr(train.Run, "train_step", lambda _: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    assert train.main(flags(data_dir, tmp_path / "twice", max_steps=12)) == 130
    assert not (tmp_path / "twice" / "ckpt.pt").exists()


# ---- The command line --------------------------------------------------------------------------------------
def test_a_finished_run_is_not_overwritten(data_dir, tmp_path, capsys):
    argv = flags(data_dir, tmp_path, max_steps=2)
    assert train.main(argv) == 0
    before = (tmp_path / "ckpt.pt").read_bytes()
    capsys.readouterr()
    assert train.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "--overwrite" in captured.err
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    assert train.main([*argv, "--overwrite", "--seed=5"]) == 0
    assert (tmp_path / "ckpt.pt").read_bytes() != before


def test_bad_flags_are_one_line(data_dir, tmp_path, capsys):
    wrong = tmp_path / "wrong.json"
    for argv, word in (
        (["--n_layers", "3"], "did you mean --n_layer?"),
        (["--learning-rat=3"], "did you mean --learning_rate?"),
        (["--n_layer", "x"], "invalid int"),
        (["--dtype", "int8"], "int8"),
        (["--max_steps", "0"], "max_steps=0"),
        (["--config", str(tmp_path / "none.json")], "none.json"),
        (["--resume", "--out_dir", str(tmp_path / "none")], "config.json"),
        (["extra"], "extra"),
    ):
        with pytest.raises(SystemExit) as info:
            train.parse_config(argv)
        err = capsys.readouterr().err
        assert info.value.code == 2 and word in err and err.count("\n") == 1, (argv, err)
    for content, word in (
        ('{"n_layes": 3}', "did you mean --n_layer?"),
        ('{"n_layer": 2.5}', "invalid int"),
        ('{"bias": "yes"}', "bias"),
        ('{"dtype": "int8"}', "int8"),
        ("[]", "wrong.json"),
        ("{", "wrong.json"),
    ):
        wrong.write_text(content)
        with pytest.raises(SystemExit) as info:
            train.parse_config(["--config", str(wrong)])
        assert info.value.code == 2 and word in capsys.readouterr().err
    for knobs, word in (
        ({"data_dir": tmp_path / "nodata"}, "train.bin"),
        ({"device": "cuda:77"}, "--device cpu"),
        ({"batch_size": 7, "micro_batch_size": 2}, "choose a multiple"),
        ({"block_size": 10**6}, "train.bin"),
        ({"n_head": 5}, "n_head=5"),
    ):
        assert train.main(flags(data_dir, tmp_path / "out", **knobs)) == 2
        err = capsys.readouterr().err
        assert word in err and err.count("\n") == 1, err


def test_settings_go_through_config_json(data_dir, tmp_path):
    config = train.parse_config(flags(data_dir, tmp_path, clip_norm="none", bias=True, time_limit_s=5))
    assert config.clip_norm is None and config.bias and config.time_limit_s == 5.0
    from dataclasses import asdict

    file = tmp_path / "config.json"
    file.write_text(json.dumps(asdict(config)))
    assert train.parse_config(["--config", str(file)]) == config
    changed = train.parse_config(["--config", str(file), "--no-bias", "--n-layer", "7"])
    assert (changed.bias, changed.n_layer, changed.n_embd) == (False, 7, config.n_embd)


def test_tokens_beyond_the_vocabulary_are_refused(data_dir, tmp_path, bpe):
    bpe.save(tmp_path / "tokenizer.json")
    for split in ("train", "val"):
        np.full(100, 330, dtype=np.uint16).tofile(tmp_path / f"{split}.bin")
    config = TrainConfig(data_dir=str(tmp_path), block_size=32)
    assert "token 330" in refused(ValueError, open_data, config, CPU)


# ---- The corpus --------------------------------------------------------------------------------------------
MODULE = '''"""Tools for shapes. They are few."""
class Shape:
    """A shape with an area."""
    def scale(self, factor=2, *, copy=True):
        """Scale the shape by a factor."""
        def inner():
            """This has no name outside."""
    def area(self):
        pass
async def load(path):
    """Load a shape from a file.  More text.

    A second paragraph.
    """
'''


@pytest.fixture
def library(tmp_path, monkeypatch) -> Path:
    """A standard library of 80 modules, with everything that is to be left out."""
    root = tmp_path / "lib"
    for i in range(80):
        file = root / ("test" if i >= 60 else "pkg") / f"mod{i}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(MODULE.replace("shape", f"shape{i}"))
    for name, text in (
        ("site-packages/x.py", "secret = 1"),
        ("big.py", "#" * 1_000_001),
        ("empty.py", "  \n"),
        ("enc.py", "\ndecoding_table = 1"),
        ("broken.py", "def ("),
    ):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    (root / "latin.py").write_bytes(b"x = '\xe9'")
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    return root


def texts(docs: list) -> set[str]:
    return {doc for doc in docs if isinstance(doc, str)}


def test_documents_are_deterministic_and_disjoint(library):
    train_docs, val_docs = list(corpus.documents("train")), list(corpus.documents("val"))
    assert train_docs == list(corpus.documents("train"))
    assert len(texts(train_docs)) + len(texts(val_docs)) == 61 and texts(val_docs)  # 60 and broken.py
    assert not texts(train_docs) & texts(val_docs)
    assert Counter(map(str, corpus.documents("all"))) == Counter(map(str, train_docs + val_docs))
    for docs in (train_docs, val_docs):  # a chat is in the split of its file
        files = {
            text.split("Tools for ")[1].split(".")[0].removeprefix("shapes") for text in texts(docs) if "Tools" in text
        }
        names = {doc[0]["content"].split("pkg.mod")[1][:2].strip(".`? ") for doc in docs if not isinstance(doc, str)}
        assert len(files) > 0 and len(names) == len(texts(docs) - {"def ("})
    with_tests = list(corpus.documents("train", tests=True))
    added = Counter(map(str, with_tests)) - Counter(map(str, train_docs))
    assert 0 < len(added) <= 20 and all("Tools for" in doc for doc in added) and "[{" not in str(list(added))[:3]
    refused(ValueError, lambda: next(corpus.documents("test")))


def test_dialogues():
    chats = corpus.dialogues(MODULE, "geo.shapes")
    asked = {chat[0]["content"]: chat[1]["content"] for chat in chats}
    assert all([m["role"] for m in chat] == ["user", "assistant"] and all(m["content"] for m in chat) for chat in chats)
    plain = {q.replace("`", ""): a for q, a in asked.items()}
    assert plain["What does geo.shapes do?"] == "Tools for shapes."
    assert plain["What does geo.shapes.Shape do?"] == "A shape with an area."
    assert plain["What does geo.shapes.Shape.scale do?"] == "Scale the shape by a factor."
    assert plain["What does geo.shapes.load do?"] == "Load a shape from a file."
    assert "`geo.shapes.Shape.scale(self, factor=2, *, copy=True)`" in asked.values()
    assert not any("inner" in text or "area(" in text for pair in asked.items() for text in pair)
    kinds = set()
    for i in range(20):  # who is asked for a kind depends on a hash of the name
        kinds |= {chat[1]["content"] for chat in corpus.dialogues(MODULE, f"m{i}") if " is a " in chat[1]["content"]}
    assert {kind.split("`")[1].split(".", 1)[1] + kind.split("`")[2] for kind in kinds} == {
        "Shape is a class.",
        "Shape.scale is a method.",
        "load is a function.",
    }
    assert corpus.dialogues("def (", "x") == []
    assert corpus.module_name("posixpath.py") == "os.path" and corpus.module_name("json/__init__.py") == "json"


def test_the_real_library_has_chats():
    docs = list(corpus.documents("val"))
    chats = [doc for doc in docs if not isinstance(doc, str)]
    assert len(chats) > 100 and len(texts(docs)) > 10
    for chat in chats:
        assert [message["role"] for message in chat] == ["user", "assistant"]
        assert all(message["content"].strip() == message["content"] != "" for message in chat)


def test_default_data_are_made_when_missing(library, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = flags(Path("data/pygpt"), tmp_path / "out", max_steps=2, batch_size=2)
    assert train.main(argv) == 0
    assert "dialogues" in capsys.readouterr().out
    tokenizer = load_tokenizer(tmp_path / "data/pygpt")
    assert tokenizer.vocab_size < 4096  # the library is small: no more pairs to merge
    ids = np.fromfile(tmp_path / "data/pygpt/val.bin", dtype=np.uint16)
    assert ids[0] == tokenizer.bos_id
    docs = tokenizer.decode(ids.tolist()).split("<|bos|>")[1:]
    expected = list(corpus.documents("val"))
    assert len(docs) == len(expected) and set(docs) >= texts(expected)
    with pytest.raises(SystemExit) as info:
        corpus.main(["--vocab_size", "100000"])
    assert info.value.code == 2 and "vocab_size" in capsys.readouterr().err


# ---- Sampling ----------------------------------------------------------------------------------------------
def test_sample_end_to_end(trained, data_dir, tmp_path, capsys, monkeypatch):
    def run(*argv: str) -> str:
        assert sample.main(["--checkpoint", str(trained), "--device", "cpu", "--max_new_tokens", "30", *argv]) == 0
        return capsys.readouterr().out

    folder = tmp_path / "data" / "tiny"  # the tokenizer by the dataset's name, from where one works
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes((data_dir / "tokenizer.json").read_bytes())
    monkeypatch.chdir(tmp_path)
    out = run("--start", "def f7(")
    assert out.count("def f7(") >= 3 and out.count("-" * 20) == 3
    assert out == run("--start", "def f7(") != run("--start", "def f7(", "--seed", "3")
    greedy = run("--start", "def f7(", "--temperature", "0", "--num_samples", "2").split("-" * 20)
    assert greedy[0].strip() == greedy[1].strip()
    prompts, generate = [], GPT.generate

    def watched(model, idx, *args, **kwargs):
        prompts.append(idx)
        return generate(model, idx, *args, **kwargs)

    monkeypatch.setattr(GPT, "generate", watched)
    assert "<|" not in run("--ask", "What does f7 do?")
    question = {"role": "user", "content": "What does f7 do?"}
    assert prompts[0].tolist() == [load_tokenizer(folder).render_chat([question], reply=True)]


def test_streamed_text_is_whole_characters(bpe):
    text = "na\u00efve \u6f22\u5b57 \U0001f642!"
    raw = list(text.encode())  # the first 256 tokens are the bytes
    out = list(sample.pieces(bpe, iter(raw)))
    assert "".join(out) == text and "\ufffd" not in "".join(out)
    assert out[raw.index(0xC3)] == "" and out[raw.index(0xC3) + 1] == "\u00ef"
    assert "".join(sample.pieces(bpe, iter([ord("a"), 0xF0, 0x9F]))) == "a\ufffd"
    assert "".join(sample.pieces(bpe, iter([ord("a"), bpe.specials["<|assistant_end|>"], ord("b")]))) == "a"


def test_bad_samples_are_one_line(trained, data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chars, both = tmp_path / "chars", tmp_path / "both"
    save_atomic(GPT(GPTConfig(16, 2, 1, 1, 8)).to_checkpoint(), chars / "ckpt.pt")
    meta = {"vocab_size": 2, "itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}}
    (chars / "meta.pkl").write_bytes(pickle.dumps(meta))
    save_atomic(GPT(GPTConfig(16, 50, 1, 1, 8)).to_checkpoint(), both / "ckpt.pt")
    (both / "tokenizer.json").write_bytes((data_dir / "tokenizer.json").read_bytes())
    for argv, word in (
        (["--checkpoint", str(tmp_path / "none.pt")], "none.pt"),
        (["--checkpoint", str(trained)], "tokenizer"),  # there is no data/tiny here
        (["--checkpoint", str(both)], "330 tokens"),
        (["--checkpoint", str(chars), "--start", "xyz"], "characters"),
        (["--checkpoint", str(chars), "--start", "a", "--max_new_tokens", "-1"], "max_new_tokens"),
        (["--checkpoint", str(chars), "--start", ""], "prompt"),
        (["--checkpoint", str(chars), "--ask", "a"], "--ask"),
        (["--checkpoint", str(chars), "--start", "a", "--top_k", "0"], "top_k"),
        (["--checkpoint", str(chars), "--start", "a", "--temperature", "-1"], "temperature"),
        (["--checkpoint", str(chars), "--device", "cuda:77"], "--device cpu"),
    ):
        assert sample.main(argv) == 2, argv
        err = capsys.readouterr().err
        assert word in err and err.count("\n") == 1, err
    assert sample.main(["--checkpoint", str(chars), "--start", "ab", "--max_new_tokens", "40"]) == 0
    with pytest.raises(SystemExit) as info:
        sample.main(["--nonsense"])
    assert info.value.code == 2 and capsys.readouterr().err.count("\n") == 1
