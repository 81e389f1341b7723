"""One interface over pygpt, anyone's nanoGPT and HuggingFace models, decoder and encoder; bad files in one sentence.

Run: python -m pytest tests/lm/test_language_model.py
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import tiktoken
import torch
from torch.nn import functional as F

from sae import hooks
from sae.config import UserError
from sae.files import ROOT, beside
from sae.hookpoints import at_layer, resolve
from sae.lm.language_model import LanguageModel, best_device, load_language_model
from sae.lm.tokenizers import HFTokenizer


def batch(lm, n=2, t=16):
    ids = torch.randint(0, 300, (n, t), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids, dtype=torch.bool)


def test_nanogpt(lm, gpt_folder):
    assert (lm.d_model, lm.n_layers, lm.max_len, lm.wrap) == (32, 3, 64, None)
    ids, valid = batch(lm)
    logits = lm.logits(ids, valid)
    assert logits.shape == (2, 16, 320)
    seen = lm.hidden(ids, valid, ["transformer.h.0", "transformer.h.2"])
    norm = lm.module.transformer.ln_f
    torch.testing.assert_close(seen["transformer.h.2"] @ torch.eye(32), seen["transformer.h.2"])
    torch.testing.assert_close(lm.module.lm_head(norm(seen["transformer.h.2"])), logits)
    wide = "transformer.h.1.mlp.c_proj@in"
    assert lm.widths([wide, "transformer.h.1"]) == {wide: 128, "transformer.h.1": 32}
    assert not any(p.requires_grad for p in lm.module.parameters())
    again = load_language_model(str(gpt_folder), device="cpu")  # the folder means its ckpt.pt
    assert again.weights_hash == lm.weights_hash
    with torch.no_grad():
        again.module.lm_head.weight[0, 0] += 1e-3
    del again.__dict__["weights_hash"]
    assert again.weights_hash != lm.weights_hash


def test_logit_effects_are_what_the_last_layers_do(lm):
    """Against autograd: the gradient of the centred logits along a direction, at a stream of unit variance."""
    directions = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    got = lm.logit_effects(directions)
    norm, head = lm.module.transformer.ln_f, lm.module.lm_head
    centred = directions - directions.mean(1, keepdim=True)
    torch.testing.assert_close(got, centred * norm.weight @ head.weight.t())
    # the norm's own derivative differs from this only along the stream itself
    x = torch.randn(32, generator=torch.Generator().manual_seed(2))
    x = (x - x.mean()) / x.std(unbiased=False)
    d = directions[0] - directions[0].mean()
    d = d - (d @ x) / (x @ x) * x
    step = 1e-3
    numeric = (head(norm(x + step * d)) - head(norm(x - step * d))) / (2 * step)
    torch.testing.assert_close(lm.logit_effects(d[None])[0], numeric, rtol=1e-2, atol=1e-3)
    assert lm.logit_effects(torch.zeros(1, 7)) is None


@pytest.mark.parametrize("hookpoint", ["transformer.h.0", "transformer.h.2", "transformer.h.1.mlp"])
def test_going_on_from_a_hookpoint_is_the_whole_forward(lm, hookpoint):
    ids, valid = batch(lm)
    x = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(3))
    shortcut = lm.logits_replacing(ids, valid, hookpoint, x)
    with hooks.replace(lm.module, {hookpoint: lambda _: x}):
        assert torch.equal(shortcut, lm.logits(ids, valid))


def test_pygpt_is_embedded():
    lm = load_language_model("pygpt", device="cpu")
    assert lm.n_layers == 12
    ids = lm.tokenizer.encode_document("import os\n\ndef main():\n    return os.path.join(")
    assert ids[0] == lm.tokenizer.bos_id
    valid = torch.ones(1, len(ids), dtype=torch.bool)
    text = lm.tokenizer.decode(ids[1:])
    logits = lm.logits(torch.tensor([ids]), valid)
    loss = F.cross_entropy(logits[0, :-1], torch.tensor(ids[1:]))
    assert text.startswith("import os")
    assert float(loss) < 4.5  # a uniform guess has log(4096) = 8.3 nats
    assert (ROOT / "assets/pygpt/ckpt.pt").stat().st_size <= 16 * 2**20


def test_huggingface_decoder(tmp_path):
    import transformers

    config = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    hf = transformers.GPT2LMHeadModel(config).eval()
    hf.save_pretrained(tmp_path)
    byte_level_tokenizer().save_pretrained(tmp_path)
    lm = load_language_model(str(tmp_path), device="cpu")
    assert (lm.d_model, lm.n_layers, lm.max_len, lm.wrap, lm.has_head) == (16, 2, 32, None, True)
    ids = torch.randint(0, 50, (2, 8))
    with torch.no_grad():
        torch.testing.assert_close(lm.logits(ids, torch.ones_like(ids).bool()), hf(ids).logits)
    assert set(lm.hidden(ids, torch.ones_like(ids).bool(), ["transformer.h.0"])) == {"transformer.h.0"}
    assert lm.unembedding.shape == (50, 16)
    assert lm.tokenizer.encode_document("ab")[0] == lm.tokenizer.bos_id


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["gpt", "hf", "bert"])
def test_models_in_half_precision(kind, dtype, gpt_path, minilm_path, tmp_path):
    name = {"gpt": gpt_path, "hf": str(tmp_path), "bert": minilm_path}[kind]
    if kind == "hf":
        test_huggingface_decoder(tmp_path)
    whole, half = (load_language_model(name, device="cpu", dtype=d) for d in ("float32", dtype))
    assert (whole.dtype, half.dtype) == ("float32", dtype)
    assert {str(p.dtype) for p in half.module.parameters()} == {f"torch.{dtype}"}
    ids, valid = (t[:, :8] for t in batch(whole))
    ids = ids % 50
    hookpoint = at_layer(whole.module, 1, "resid_post")
    x, close = (lm.hidden(ids, valid, [hookpoint])[hookpoint] for lm in (half, whole))
    assert str(x.dtype) == f"torch.{dtype}"
    assert float((x.float() - close).norm() / (close - close.mean((0, 1))).norm()) < 0.1
    assert half.widths([hookpoint]) == whole.widths([hookpoint])
    if kind == "bert":
        return
    torch.testing.assert_close(half.logits_replacing(ids, valid, hookpoint, x), half.logits(ids, valid))
    torch.testing.assert_close(half.logits(ids, valid).float(), whole.logits(ids, valid), rtol=0.05, atol=0.05)
    written = list(half.generate(ids[:1], 4, temperature=0))
    assert len(written) == 4
    assert half.logit_effects(torch.ones(1, half.d_model)).dtype == torch.float32


def test_a_model_computes_in_what_models_compute_in(gpt_path):
    with pytest.raises(UserError, match="dtype='int8'; a model computes in float32, bfloat16, float16"):
        load_language_model(gpt_path, device="cpu", dtype="int8")


@pytest.mark.parametrize("kind", ["Roberta", "Albert"])
def test_encoders_of_other_families(kind, tmp_path):
    import transformers
    from tokenizers import Tokenizer, models

    small = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**small, max_position_embeddings=66, pad_token_id=1)
    getattr(transformers, f"{kind}Model")(config).save_pretrained(tmp_path)
    inner = Tokenizer(models.WordLevel({f"t{i}": i for i in range(99)}, unk_token="t9"))
    special = {"unk_token": "t9", "cls_token": "t0", "sep_token": "t2", "pad_token": "t1"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(tmp_path)
    lm = load_language_model(str(tmp_path), device="cpu")
    if kind == "Albert":  # one block, run for every layer
        with pytest.raises(UserError, match=r"runs 'encoder.albert_layer_groups.0' 2 times in one forward"):
            lm.widths(["encoder.albert_layer_groups.0"])
        return
    assert lm.max_len == 64  # positions begin behind the padding's
    ids = torch.randint(5, 99, (2, lm.max_len))
    assert lm.hidden(ids, torch.ones_like(ids).bool(), ["encoder.layer.1"])["encoder.layer.1"].shape == (2, 64, 32)


def byte_level_tokenizer():
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={"<|end|>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|end|>", eos_token="<|end|>", model_max_length=32
    )


def test_huggingface_tokens_are_shown_exactly():
    tokenizer = HFTokenizer(byte_level_tokenizer())
    ids = tokenizer.encode(" \u00e9\n")
    assert [tokenizer.token_str(i) for i in ids] == [" ", r"\xc3", r"\xa9", "\n"]  # never U+FFFD
    assert tokenizer.token_str(0) == "<|end|>"
    assert tokenizer.token_str(10_000) == "<10000>"
    assert tokenizer.decode(ids) == " \u00e9\n"
    assert tokenizer.special_ids == {0}
    assert len(tokenizer.content_hash()) == 64


def test_real_bert(minilm_path):
    lm = load_language_model(minilm_path, device="cpu")
    assert (lm.d_model, lm.n_layers, lm.wrap is None, lm.has_head) == (384, 6, False, False)
    assert lm.wrap == (101, 102)
    assert lm.logits(torch.tensor([[101, 2023, 102]]), torch.ones(1, 3).bool()) is None
    assert lm.unembedding is None
    assert lm.logit_effects(torch.zeros(1, 384)) is None
    # padding must not be seen: an encoder looks both ways
    short = torch.tensor([[101, 2023, 2003, 102]])
    padded = torch.tensor([[101, 2023, 2003, 102, 0, 0]])
    name = "encoder.layer.3"
    a = lm.hidden(short, torch.ones_like(short).bool(), [name])[name]
    b = lm.hidden(padded, padded > 0, [name])[name]
    torch.testing.assert_close(a[0], b[0, :4], rtol=1e-4, atol=1e-5)
    pieces = [lm.tokenizer.token_str(i) for i in lm.tokenizer.encode("unaffable, it is")]
    assert "".join(pieces) == " unaffable , it is" and len(pieces) > 5


def test_short_rows_of_an_encoder_run_with_their_like(minilm_path):
    lm = load_language_model(minilm_path, device="cpu")
    lengths = [3, 40, 200, 7, 64, 33, 1, 8]
    ids = torch.randint(1000, 20_000, (len(lengths), 200), generator=torch.Generator().manual_seed(0))
    valid = torch.arange(200) < torch.tensor(lengths)[:, None]
    names, widths, forward = ["encoder.layer.3", "encoder.layer.1.attention@in"], [], lm.forward_fn
    want = lm._hidden(ids, valid, names)
    lm.forward_fn = lambda module, ids, valid: widths.append(tuple(ids.shape)) or forward(module, ids, valid)
    got = lm.hidden(ids, valid, names)
    assert sorted(widths) == [(1, 200), (3, 64), (4, 8)]
    for name in names:
        assert got[name].shape == want[name].shape
        torch.testing.assert_close(got[name][valid], want[name][valid], rtol=1e-4, atol=1e-5)
        assert not got[name][0, 8:].any()
    pooled = lm.hidden(ids, valid, ["pooler"])["pooler"]  # of rows, not of tokens
    assert pooled.shape == (len(lengths), 384)
    torch.testing.assert_close(pooled[1], lm.hidden(ids[1:2, :40], valid[1:2, :40], ["pooler"])["pooler"][0])
    widths.clear()
    lm.hidden(ids[:, :8], valid[:, :8] | True, names)
    assert widths == [(8, 8)]
    widths.clear()
    lm.hidden(ids, valid & (torch.arange(200) < 8), names)  # all of them short
    assert widths == [(8, 8)]


def write(path, data: bytes):
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda t, _: t / "none.pt", "does not exist"),
        (lambda _t, _g: "./nowhere/at/all", "does not exist"),
        (lambda t, _: t, "neither a ckpt.pt nor a HuggingFace config.json"),
        (lambda t, g: write(t / "ckpt.pt", (g / "ckpt.pt").read_bytes()[:5000]), ""),
        (lambda t, _: write(t / "ckpt.pt", b""), ""),
        (lambda t, _: write(t / "ckpt.pt", b"not a checkpoint at all"), ""),
        (lambda t, _: (write(t / "config.json", b"{"), t)[1], "not valid json"),
        (lambda t, _: (write(t / "config.json", b'{"model_type": "nonsense"}'), t)[1], "cannot load"),
    ],
)
def test_bad_models_are_one_sentence(tmp_path, gpt_folder, make, words):
    with pytest.raises(UserError) as e:
        load_language_model(str(make(tmp_path, gpt_folder)), device="cpu")
    assert words in str(e.value)
    assert len(str(e.value).splitlines()) == 1


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    with (tmp_path / "ckpt.pt").open("wb") as f:
        pickle.dump({"model": Evil(), "model_args": {}}, f)
    with pytest.raises(UserError, match="ckpt.pt"):
        load_language_model(str(tmp_path / "ckpt.pt"), device="cpu")
    torch.save({"model": Evil(), "model_args": {}}, tmp_path / "zip.pt")
    with pytest.raises(UserError, match="run code"):
        load_language_model(str(tmp_path / "zip.pt"), device="cpu")
    assert not marker.exists()


def test_tokenizer_of_a_checkpoint(tmp_path, gpt_folder):
    shutil.copy(gpt_folder / "ckpt.pt", tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="no tokenizer for"):
        load_language_model(str(tmp_path / "ckpt.pt"), device="cpu")
    data = tmp_path / "data"
    data.mkdir()
    chars = {chr(97 + i): i for i in range(20)}
    (data / "meta.pkl").write_bytes(
        pickle.dumps({"vocab_size": 20, "stoi": chars, "itos": {i: c for c, i in chars.items()}})
    )
    lm = load_language_model(str(tmp_path / "ckpt.pt"), device="cpu", dataset=str(data))
    assert lm.tokenizer.encode("abc") == [0, 1, 2]


THEIR_MODEL = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

class LayerNorm(nn.Module):
    def __init__(self, ndim, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)

class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))

class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.attn = LayerNorm(config.n_embd, config.bias), CausalSelfAttention(config)
        self.ln_2, self.mlp = LayerNorm(config.n_embd, config.bias), MLP(config)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        assert config.n_embd % config.n_head == 0
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd), wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout), h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=LayerNorm(config.n_embd, config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        print("number of parameters: %.2fM" % (sum(p.numel() for p in self.parameters()) / 1e6,))

    def forward(self, idx, targets=None):
        x = self.transformer.wte(idx) + self.transformer.wpe(torch.arange(idx.shape[1], device=idx.device))
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, [-1], :]), None
        logits = self.lm_head(x)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
"""
CHARS = "abcdefghijklmnopqrstuvwxyz .,\n"
THEIR_ARGS = {
    "n_layer": 3,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 32,
    "bias": False,
    "vocab_size": len(CHARS),
    "dropout": 0.1,
}


def their_gpt(args):
    module = ModuleType("their_model")
    exec(THEIR_MODEL, module.__dict__)
    torch.manual_seed(0)
    return module.GPT(module.GPTConfig(**args)).eval()


def save_theirs(path, gpt, **changes):
    """ckpt.pt as nanoGPT's train.py saves it after torch.compile."""
    weights = {f"_orig_mod.{name}": w for name, w in gpt.state_dict().items()} | changes.pop("weights", {})
    checkpoint = {
        "model": weights,
        "optimizer": {"state": {}, "param_groups": []},
        "model_args": THEIR_ARGS,
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "chars", "compile": True},
        **changes,
    }
    path.parent.mkdir(exist_ok=True)
    torch.save(checkpoint, path)


@pytest.fixture
def checkout(tmp_path):
    """Somebody's nanoGPT with sae/ and scripts/ put beside its model.py: data, a checkpoint, none of our own files."""
    for name in ("sae", "scripts"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "model.py").write_text(THEIR_MODEL)
    data = tmp_path / "data" / "chars"
    data.mkdir(parents=True)
    for split, n in (("train", 6000), ("val", 1500)):
        np.random.default_rng(0).integers(0, len(CHARS), n).astype(np.uint16).tofile(data / f"{split}.bin")
    stoi = {c: i for i, c in enumerate(CHARS)}
    (data / "meta.pkl").write_bytes(
        pickle.dumps({"vocab_size": len(CHARS), "stoi": stoi, "itos": dict(enumerate(CHARS))})
    )
    save_theirs(tmp_path / "out" / "ckpt.pt", their_gpt(THEIR_ARGS))
    return tmp_path


def test_sae_beside_somebodys_nanogpt(checkout):
    def run(script, *flags):
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [sys.executable, "-m", f"scripts.{script}", *flags]
        return subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)

    small = ["--k", "4", "--batch_size", "64", "--buffer_tokens", "256", "--max_tokens", "640", "--val_tokens", "200"]
    trained = run("sae_train", "--model", "out/ckpt.pt", "--dataset", "data/chars", "--layer", "1", *small)
    assert trained.returncode == 0, trained.stderr
    assert "number of parameters" not in trained.stdout
    evaluated = run("sae_eval", "--eval_tokens", "300")
    assert evaluated.returncode == 0, evaluated.stderr
    report = json.loads((checkout / "sae_models" / "layer_1" / "eval.json").read_text())
    assert (report["hookpoint"], report["d_in"], report["d_sae"]) == ("transformer.h.1", 16, 128)
    assert report["ce_clean"] != report["ce_zero"]


@pytest.fixture
def beside_theirs(checkout, monkeypatch):
    """The same folder, for tests in this process."""
    monkeypatch.setattr("sae.files.ROOT", checkout)
    return checkout


def test_their_model_is_run_as_it_is(beside_theirs, capsys):
    state = torch.random.get_rng_state()
    lm = load_language_model(str(beside_theirs / "out"), device="cpu")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert capsys.readouterr().out == ""
    assert (lm.d_model, lm.n_layers, lm.max_len, lm.tokenizer.vocab_size) == (16, 3, 32, len(CHARS))
    gpt = their_gpt(THEIR_ARGS)
    ids = torch.randint(0, len(CHARS), (2, 16), generator=torch.Generator().manual_seed(0))
    valid = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(lm.logits(ids, valid), gpt(ids, ids)[0])
    # whatever their forward does between blocks is done: no shortcut past it
    assert lm.resume_fn is None
    place = lambda kind: resolve(lm.module, layers=[1], hook_type=kind)
    assert place("resid_mid") == ["transformer.h.1.ln_2@in"]
    assert place("mlp_post_act") == ["transformer.h.1.mlp.c_proj@in"]
    effects = lm.logit_effects(torch.eye(16))
    centred = torch.eye(16) - 1 / 16
    torch.testing.assert_close(effects, centred * gpt.transformer.ln_f.weight @ gpt.lm_head.weight.t())


def test_their_tokenizers(beside_theirs, monkeypatch):
    path = beside_theirs / "out" / "ckpt.pt"
    # a tokenizer.py that is not ours is not run
    (beside_theirs / "tokenizer.py").write_text("raise RuntimeError('this trains a tokenizer')")
    t = load_language_model(str(path), device="cpu").tokenizer
    assert t.encode_document("ab z") == [0, 1, 26, 25]
    assert t.decode([0, 1]) == "ab"
    assert (t.token_str(2), t.token_str(29), t.token_str(999), t.bos_id, t.special_ids) == (
        "c",
        "\n",
        "<999>",
        None,
        set(),
    )
    with pytest.raises(ValueError, match="none of this model's 30 characters"):
        t.encode("\u00e9")
    # ours reads the same table the same way
    shutil.copy(ROOT / "tokenizer.py", beside_theirs / "tokenizer.py")
    ours = load_language_model(str(path), device="cpu").tokenizer
    assert type(ours).__module__ == "tokenizer"
    assert ours.content_hash() == t.content_hash()
    (beside_theirs / "tokenizer.py").unlink()

    class Evil:
        def __reduce__(self):
            return (open, (str(beside_theirs / "ran"), "w"))

    meta = beside_theirs / "data" / "chars" / "meta.pkl"
    for content, words in (
        (pickle.dumps({"itos": Evil()}), "refused or unreadable"),
        (b"", "refused or unreadable"),
        (pickle.dumps([1]), "no table of characters"),
        (pickle.dumps({"itos": {0: "a", 1: "a"}}), "no table of characters"),
        (pickle.dumps({"itos": {0: "a", 2: "b"}}), "no table of characters"),
    ):
        meta.write_bytes(content)
        with pytest.raises(UserError, match=words):
            load_language_model(str(path), device="cpu")
    assert not (beside_theirs / "ran").exists()
    meta.unlink()
    with pytest.raises(UserError, match=r"no tokenizer for .*; put its meta.pkl beside it, or give the nanoGPT data"):
        load_language_model(str(path), device="cpu")


def test_their_tokenizer_is_gpt2s_where_the_vocabulary_is(beside_theirs, monkeypatch):
    path, args = beside_theirs / "out" / "ckpt.pt", {**THEIR_ARGS, "vocab_size": 50304}
    (beside_theirs / "data" / "chars" / "meta.pkl").unlink()
    save_theirs(path, their_gpt(args), model_args=args)
    ranks = {bytes([b]): b for b in range(256)}
    gpt2 = tiktoken.Encoding("gpt2", pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda _: gpt2)
    t = load_language_model(str(path), device="cpu").tokenizer
    assert t.encode_document("ab") == [256, 97, 98]
    assert (t.special_ids, t.token_str(256), t.token_str(50300)) == ({256}, "<|endoftext|>", "<50300>")
    chat = [{"role": "user", "content": "hi"}]
    assert t.decode(t.encode_document(chat)[1:]) == "user: hi\n"
    with pytest.raises(ValueError, match="is no chat message"):
        t.encode_document([{"role": "user"}])

    def offline(_):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="needs a download"):
        load_language_model(str(path), device="cpu")


def test_their_checkpoints_must_fit(beside_theirs, tmp_path):
    path, gpt = beside_theirs / "out" / "ckpt.pt", their_gpt(THEIR_ARGS)

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    mask = torch.ones(1, 1, 32, 32)  # stored where attention was not flash
    save_theirs(path, gpt, weights={"_orig_mod.transformer.h.0.attn.bias": mask})
    assert load_language_model(str(path), device="cpu").n_layers == 3
    whole = path.read_bytes()
    for changes, words in (
        ({"weights": {"extra.weight": torch.ones(1)}}, "lacks or adds extra.weight"),
        ({"model_args": {**THEIR_ARGS, "n_layer": 4}}, "lacks or adds transformer.h.3.ln_1.weight"),
        ({"model_args": {**THEIR_ARGS, "n_embd": 8}}, "cannot build .*size mismatch"),
        ({"model_args": {**THEIR_ARGS, "rotary": True}}, "cannot build .*rotary"),
        ({"model_args": {**THEIR_ARGS, "n_head": 3}}, "cannot build .*AssertionError"),
        ({"model_args": None}, "wanted nanoGPT's model and model_args"),
        ({"weights": {"x": Evil()}}, "refused: it wants to run code"),
    ):
        save_theirs(path, gpt, **changes)
        with pytest.raises(UserError, match=words) as e:
            load_language_model(str(path), device="cpu")
        assert len(str(e.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()
    path.write_bytes(whole)
    (beside_theirs / "model.py").write_text("x = 1")
    with pytest.raises(UserError, match="cannot build .*no attribute 'GPT'"):
        load_language_model(str(path), device="cpu")
    (beside_theirs / "model.py").unlink()
    with pytest.raises(UserError, match=r"'model.py' is not beside the sae folder"):
        load_language_model(str(path), device="cpu")


def test_any_module_with_a_tokenizer(lm):
    """What load_language_model returns can be built by hand around any nn.Module."""
    mine = LanguageModel(
        module=lm.module,
        tokenizer=lm.tokenizer,
        forward_fn=lambda m, ids, _valid: m(ids)[0],
        name="mine",
        d_model=32,
        max_len=64,
    )
    ids, valid = batch(lm)
    torch.testing.assert_close(mine.logits(ids, valid), lm.logits(ids, valid))


def test_devices():
    assert best_device("cpu").type == "cpu"
    for name in ("gpuu", "cuda:99"):
        with pytest.raises(UserError, match="try --device cpu"):
            best_device(name)
    with pytest.raises(UserError, match="is not beside"):
        beside("no_such_file.py")
