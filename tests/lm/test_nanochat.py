"""nanochat models: loaded by name and by folder through nanochat's own code, each hookpoint the tensor it is named for.

A small package with nanochat's names, signatures and file layout stands in for it: streams mixed between blocks, value
embeddings, smear, backout, norms that are functions, a soft cap, a padded vocabulary.

Run: python -m pytest tests/lm/test_nanochat.py
"""

import json
import pickle
import sys
from functools import partial

import pytest
import tiktoken
import torch
from torch.nn import functional as F

from sae import hooks
from sae.config import SAEConfig, UserError
from sae.data.datasets import open_dataset
from sae.data.tokens import TokenRows
from sae.evaluator import evaluate
from sae.formats import store
from sae.hookpoints import at_layer, resolve
from sae.lm.language_model import load_language_model
from sae.models import create_sae
from scripts import sae_collect, sae_eval, sae_train

GPT = """
from dataclasses import dataclass
import torch
from torch import nn
from torch.nn import functional as F
from nanochat import common

TABLES = getattr(common, "COMPUTE_DTYPE", torch.bfloat16)
SEEN = {}  # what was computed, under the names of the hook types; the tests compare the hooks with it


@dataclass
class GPTConfig:
    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768
    window_pattern: str = "SSSL"


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight.to(dtype=x.dtype))


def has_ve(i, n_layer):
    return i % 2 == (n_layer - 1) % 2


class CausalSelfAttention(nn.Module):
    def __init__(self, config, i):
        super().__init__()
        self.n_head = config.n_head
        for name in ("c_q", "c_k", "c_v", "c_proj"):
            setattr(self, name, Linear(config.n_embd, config.n_embd, bias=False))
        self.ve_gate = Linear(4, config.n_head, bias=False) if has_ve(i, config.n_layer) else None

    def forward(self, x, ve, cos_sin, window_size, kv_cache):
        B, T, C = x.shape
        heads = lambda y: y.view(B, T, self.n_head, -1)
        q, k, v = heads(self.c_q(x)), heads(self.c_k(x)), heads(self.c_v(x))
        if ve is not None:
            v = v + 3 * torch.sigmoid(self.ve_gate(x[..., :4])).unsqueeze(-1) * heads(ve)
        cos, sin = cos_sin
        half = C // self.n_head // 2
        q, k = (norm(y * cos + torch.cat((y[..., half:], -y[..., :half]), -1) * sin) for y in (q, k))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(1.2 * q, 1.2 * k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config, i):
        super().__init__()
        self.i = i
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=False)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        SEEN["mlp_post_act", self.i] = x = F.relu(self.c_fc(x)).square()
        return self.c_proj(x)


class Block(nn.Module):
    def __init__(self, config, i):
        super().__init__()
        self.i, self.attn, self.mlp = i, CausalSelfAttention(config, i), MLP(config, i)

    def forward(self, x, ve, cos_sin, window_size, kv_cache):
        SEEN["resid_pre", self.i] = x
        SEEN["attn", self.i] = a = self.attn(norm(x), ve, cos_sin, window_size, kv_cache)
        x = x + a
        SEEN["mlp", self.i] = m = self.mlp(norm(x))
        SEEN["resid_post", self.i] = x = x + m
        return x


class GPT(nn.Module):
    def __init__(self, config, pad_vocab_size_to=64):
        super().__init__()
        self.config = config
        padded = -(-config.vocab_size // pad_vocab_size_to) * pad_vocab_size_to
        n, D = config.n_layer, config.n_embd
        h = nn.ModuleList([Block(config, i) for i in range(n)])
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(padded, D), "h": h})
        self.lm_head = Linear(D, padded, bias=False)
        self.resid_lambdas, self.x0_lambdas = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))
        self.smear_gate, self.smear_lambda = Linear(8, 1, bias=False), nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(0.2 * torch.ones(1))
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(padded, D) for i in range(n) if has_ve(i, n)})
        self.init_buffers()

    def init_buffers(self):
        half = self.config.n_embd // self.config.n_head // 2
        angles = torch.outer(torch.arange(10.0 * self.config.sequence_len), 100 ** -torch.linspace(0, 1, half))
        angles = torch.cat((angles, angles), -1)[None, :, None, :]
        self.register_buffer("cos", angles.cos().to(TABLES), persistent=False)
        self.register_buffer("sin", angles.sin().to(TABLES), persistent=False)

    def forward(self, idx, targets=None, kv_cache=None, loss_reduction="mean"):
        B, T = idx.shape
        assert self.cos.dtype == TABLES, f"Rotary embeddings must be in {TABLES}"
        x = norm(self.transformer.wte(idx).to(getattr(common, "COMPUTE_DTYPE", self.transformer.wte.weight.dtype)))
        if kv_cache is None:
            assert T > 1, "Training forward pass should have T > 1"
            gate = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[:, 1:, :8]))
            x = torch.cat((x[:, :1], x[:, 1:] + gate * x[:, :-1]), 1)
        x0, middle = x, None
        for i, block in enumerate(self.transformer.h):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            ve = self.value_embeds[str(i)](idx).to(x.dtype) if str(i) in self.value_embeds else None
            x = block(x, ve, (self.cos[:, :T], self.sin[:, :T]), (-1, 0), kv_cache)
            if i == self.config.n_layer // 2:
                middle = x
        logits = self.lm_head(norm(x - self.backout_lambda.to(x.dtype) * middle))[..., : self.config.vocab_size].float()
        logits = 15 * torch.tanh(logits / 15)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=loss_reduction)
"""

TOKENIZER = """
import os, pickle


class RustBPETokenizer:
    def __init__(self, enc, bos_token):
        self.enc, self.bos_token_id = enc, enc.encode_single_token(bos_token)

    def get_vocab_size(self):
        return self.enc.n_vocab

    def get_special_tokens(self):
        return self.enc.special_tokens_set

    def encode_special(self, text):
        return self.enc.encode_single_token(text)

    def get_bos_token_id(self):
        return self.bos_token_id

    def encode(self, text, prepend=None, append=None, num_threads=8):
        return self.enc.encode_ordinary(text)

    def decode(self, ids):
        return self.enc.decode(ids)

    def render_conversation(self, conversation, max_tokens=2048):
        ids, mask = [self.bos_token_id], [0]
        for i, message in enumerate(conversation["messages"]):
            role = ("user", "assistant")[i % 2]
            assert message["role"] == role, f"Message {i} is from {message['role']} but should be from {role}"
            content = self.encode(message["content"])
            ids += [self.encode_special(f"<|{role}_start|>"), *content, self.encode_special(f"<|{role}_end|>")]
            mask += [0, *[i % 2] * (len(content) + 1)]
        return ids[:max_tokens], mask[:max_tokens]


def get_tokenizer():
    from nanochat.common import get_base_dir
    with open(os.path.join(get_base_dir(), "tokenizer", "tokenizer.pkl"), "rb") as f:
        return RustBPETokenizer(pickle.load(f), "<|bos|>")
"""

MANAGER = """
import glob, json, os, re
import torch
from nanochat.common import get_base_dir
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import get_tokenizer


def save_checkpoint(checkpoint_dir, step, model_data, optimizer_data, meta_data, rank=0):
    os.makedirs(checkpoint_dir, exist_ok=True)
    torch.save(model_data, os.path.join(checkpoint_dir, f"model_{step:06d}.pt"))
    with open(os.path.join(checkpoint_dir, f"meta_{step:06d}.json"), "w") as f:
        json.dump(meta_data, f)


def load_checkpoint(checkpoint_dir, step, device, load_optimizer=False, rank=0):
    # weights_only=False was torch.load's default before torch 2.6
    path = os.path.join(checkpoint_dir, f"model_{step:06d}.pt")
    model_data = torch.load(path, map_location=device, weights_only=False)
    with open(os.path.join(checkpoint_dir, f"meta_{step:06d}.json")) as f:
        return model_data, None, json.load(f)


def build_model(checkpoint_dir, step, device, phase):
    assert phase in ["train", "eval"], f"Invalid phase: {phase}"
    model_data, _, meta = load_checkpoint(checkpoint_dir, step, device)
    if device.type in {"cpu", "mps"}:
        model_data = {k: v.float() if v.dtype == torch.bfloat16 else v for k, v in model_data.items()}
    model_data = {k.removeprefix("_orig_mod."): v for k, v in model_data.items()}
    with torch.device("meta"):
        model = GPT(GPTConfig(**meta["model_config"]))
    model.to_empty(device=device)
    model.init_buffers()
    model.load_state_dict(model_data, strict=True, assign=True)
    model.train(phase == "train")
    tokenizer = get_tokenizer()
    assert tokenizer.get_vocab_size() == meta["model_config"]["vocab_size"]
    return model, tokenizer, meta


def find_largest_model(checkpoints_dir):
    depths = [int(m[1]) for name in os.listdir(checkpoints_dir) if (m := re.match(r"d(\\d+)", name))]
    if not depths:
        raise FileNotFoundError(f"No checkpoints found in {checkpoints_dir}")
    return f"d{max(depths)}"


def find_last_step(checkpoint_dir):
    files = glob.glob(os.path.join(checkpoint_dir, "model_*.pt"))
    steps = [int(m[1]) for f in files if (m := re.search(r"model_(\\d+).pt$", f))]
    if not steps:
        raise FileNotFoundError(f"No checkpoints found in {checkpoint_dir}")
    return max(steps)


def load_model_from_dir(checkpoints_dir, device, phase, model_tag=None, step=None):
    checkpoint_dir = os.path.join(checkpoints_dir, model_tag or find_largest_model(checkpoints_dir))
    step = find_last_step(checkpoint_dir) if step is None else step
    return build_model(checkpoint_dir, step, device, phase)


def load_model(source, *args, **kwargs):
    folder = {"base": "base_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}[source]
    return load_model_from_dir(os.path.join(get_base_dir(), folder), *args, **kwargs)
"""

COMMON = """
import os
import torch

if "NANOCHAT_DTYPE" in os.environ:  # newer ones compute in a dtype of their own choice; older ones have no such name
    COMPUTE_DTYPE = getattr(torch, os.environ["NANOCHAT_DTYPE"])


def get_base_dir():
    return os.environ["NANOCHAT_BASE_DIR"]
"""

ROLES = ("user", "assistant", "python", "output")
SPECIALS = ["<|bos|>", *(f"<|{role}_{end}|>" for role in ROLES for end in ("start", "end"))]
N_LAYERS, D, HOOK_TYPES = 3, 32, ("resid_pre", "resid_post", "attn", "mlp", "mlp_post_act")


def encoding() -> tiktoken.Encoding:
    ranks = [bytes([b]) for b in range(256)] + [b"al", b"ph", b"mu", b"et"]
    specials = {name: len(ranks) + i for i, name in enumerate(SPECIALS)}
    return tiktoken.Encoding(
        "stand-in", pat_str=r"\S+|\s+", mergeable_ranks={t: i for i, t in enumerate(ranks)}, special_tokens=specials
    )


@pytest.fixture
def nanochat(tmp_path, monkeypatch, request):
    """A checkout on the path and its base directory with a tokenizer; yields the package's checkpoint_manager.

    Its parameter: the dtype that nanochat computes in, if it is one that chooses.
    """
    if getattr(request, "param", None):
        monkeypatch.setenv("NANOCHAT_DTYPE", request.param)
    package, base = tmp_path / "checkout" / "nanochat", tmp_path / "base"
    package.mkdir(parents=True)
    files = {"__init__": "", "common": COMMON, "gpt": GPT, "tokenizer": TOKENIZER, "checkpoint_manager": MANAGER}
    for name, text in files.items():
        (package / f"{name}.py").write_text(text)
    (base / "tokenizer").mkdir(parents=True)
    (base / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(encoding()))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.syspath_prepend(str(package.parent))
    from nanochat import checkpoint_manager

    yield checkpoint_manager
    for name in [name for name in sys.modules if name.partition(".")[0] == "nanochat"]:
        del sys.modules[name]


@pytest.fixture
def base(nanochat, tmp_path):
    """base/d2 at steps 5 and 500, with every lambda and embedding at work; returns its folder."""
    folder = tmp_path / "base" / "base_checkpoints" / "d2"
    for step in (5, 500):
        write(nanochat, folder, step)
    return folder


def write(manager, folder, step, **config):
    config = {
        "sequence_len": 48,
        "vocab_size": encoding().n_vocab,
        "n_layer": N_LAYERS,
        "n_head": 2,
        "n_kv_head": 2,
        "n_embd": D,
        "window_pattern": "L",
        **config,
    }
    model = manager.GPT(manager.GPTConfig(**config))
    g = torch.Generator().manual_seed(step)
    weights = {}
    for name, w in model.state_dict().items():
        size = 1.0 if "embed" in name or "wte" in name or "lambda" in name else 2 * w.shape[-1] ** -0.5
        w = size * torch.randn(w.shape, generator=g) + (1.0 if name == "resid_lambdas" else 0.0)
        weights[f"_orig_mod.{name}"] = w.bfloat16() if "wte" in name else w  # as torch.compile and nanochat save
    manager.save_checkpoint(str(folder), step, weights, None, {"step": step, "model_config": config})


def batch(lm, t=12):
    ids = torch.randint(0, 256, (2, t), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids, dtype=torch.bool)


def test_names_and_folders_are_the_same_model(base, nanochat):
    lm = load_language_model("nanochat:base", device="cpu")
    assert lm.name == "nanochat:base@000500"  # what is the newest now, said so that it stays this one
    assert (lm.d_model, lm.n_layers, lm.max_len, lm.has_head, lm.wrap) == (D, 3, 48, True, None)
    same = [
        "nanochat:base/d2",
        "nanochat:base/d2@500",
        "nanochat:base@000500",
        str(base),
        str(base / "model_000500.pt"),
    ]
    for name in same:
        again = load_language_model(name, device="cpu")
        assert again.weights_hash == lm.weights_hash, name
        assert load_language_model(again.name, device="cpu").name == again.name
    assert again.name == str(base / "model_000500.pt")
    other = load_language_model("nanochat:base/d2@5", device="cpu")
    assert other.weights_hash != lm.weights_hash
    assert other.weights_hash == load_language_model(str(base / "model_000005.pt"), device="cpu").weights_hash
    write(nanochat, base.parent.parent / "chatsft_checkpoints" / "d3", 7, n_embd=48)
    assert load_language_model("nanochat:sft", device="cpu").d_model == 48
    assert not lm.module.training
    assert not any(p.requires_grad for p in lm.module.parameters())
    # nanochat keeps embeddings in bfloat16 on a GPU and in float32 on a CPU: the same model for all that
    lm.module.transformer.wte.bfloat16()
    del lm.__dict__["weights_hash"]
    assert lm.weights_hash == again.weights_hash


def test_logits_are_the_models_own(base):
    lm = load_language_model("nanochat:base", device="cpu")
    ids, valid = batch(lm)
    logits = lm.logits(ids, valid)
    assert logits.shape == (2, 12, encoding().n_vocab)  # not the padded vocabulary
    assert torch.equal(logits, lm.module(ids))
    assert float(logits.abs().max()) <= 15
    for hook_type, width in zip(HOOK_TYPES, (D, D, D, D, 4 * D), strict=True):
        hookpoint = at_layer(lm.module, 1, hook_type)
        assert lm.widths([hookpoint])[hookpoint] == width
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=5e-5)  # products of other shapes round otherwise
    # padding on the right is not seen
    padded = torch.cat((ids, torch.zeros(2, 3, dtype=torch.int64)), 1)
    seen = torch.cat((valid, torch.zeros(2, 3, dtype=torch.bool)), 1)
    close(lm.logits(padded, seen)[:, :12], logits)
    # one position alone, which nanochat's forward refuses
    first, one = ids[:, :1], valid[:, :1]
    close(lm.logits(first, one), logits[:, :1])
    x = lm.hidden(first, one, ["transformer.h.1"])["transformer.h.1"]
    close(x, lm.hidden(ids, valid, ["transformer.h.1"])["transformer.h.1"][:, :1])
    close(lm.logits_replacing(first, one, "transformer.h.1", x), logits[:, :1])


@pytest.mark.parametrize("hook_type", HOOK_TYPES)
@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_each_hookpoint_is_what_the_model_computes(base, layer, hook_type):
    from nanochat.gpt import SEEN

    lm = load_language_model("nanochat:base", device="cpu")
    ids, valid = batch(lm)
    name = at_layer(lm.module, layer, hook_type)
    captured = lm.hidden(ids, valid, [name])[name]
    SEEN.clear()
    plain = lm.logits(ids, valid)
    assert torch.equal(captured, SEEN[hook_type, layer])
    if hook_type == "resid_pre" and layer > 0:
        assert not torch.allclose(captured, SEEN["resid_post", layer - 1])  # mixed in between
    assert torch.equal(lm.logits_replacing(ids, valid, name, captured), plain)
    with hooks.replace(lm.module, {name: lambda x: x}):
        assert torch.equal(lm.logits(ids, valid), plain)


@torch.no_grad()
def by_hand(module, ids, layer, x):
    """Logits when block `layer` returns x: nanochat's forward written out, with that block left out."""
    norm = lambda y: F.rms_norm(y, (y.shape[-1],))
    y = norm(module.transformer.wte(ids))
    gate = module.smear_lambda * torch.sigmoid(module.smear_gate(y[:, 1:, :8]))
    x0 = y = middle = torch.cat((y[:, :1], y[:, 1:] + gate * y[:, :-1]), 1)
    for i, block in enumerate(module.transformer.h):
        y = module.resid_lambdas[i] * y + module.x0_lambdas[i] * x0
        ve = module.value_embeds[str(i)](ids) if str(i) in module.value_embeds else None
        cos_sin = module.cos[:, : ids.shape[1]], module.sin[:, : ids.shape[1]]
        y = x if i == layer else block(y, ve, cos_sin, (-1, 0), None)
        middle = y if i == N_LAYERS // 2 else middle
    logits = module.lm_head(norm(y - module.backout_lambda * middle))[..., : module.config.vocab_size]
    return 15 * torch.tanh(logits / 15)


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_replacing_a_block_is_the_model_run_by_hand(base, layer):
    lm = load_language_model("nanochat:base", device="cpu")
    ids, valid = batch(lm)
    plain = lm.logits(ids, valid)
    for x in (torch.zeros(2, 12, D), torch.randn(2, 12, D, generator=torch.Generator().manual_seed(1))):
        got = lm.logits_replacing(ids, valid, f"transformer.h.{layer}", x)
        torch.testing.assert_close(got, by_hand(lm.module, ids, layer, x))
        assert not torch.allclose(got, plain)


def test_logit_effects_follow_a_norm_that_is_a_function(base):
    """Against the real end of the model: the derivative along a direction, per logit and up to the norm's scale."""
    lm = load_language_model("nanochat:base", device="cpu")
    ids, valid = batch(lm)
    last = f"transformer.h.{N_LAYERS - 1}"
    x = lm.hidden(ids, valid, [last])[last]
    direction = torch.randn(1, D, generator=torch.Generator().manual_seed(2))
    got = lm.logit_effects(direction)
    assert got.shape == (1, encoding().n_vocab)
    final = x - lm.module.backout_lambda * lm.hidden(ids, valid, ["transformer.h.1"])["transformer.h.1"]
    # the norm's derivative has a second part along the stream itself, so the direction is taken across it
    f, x = final[0, -1], x[0, -1]
    d = direction[0] - (direction[0] @ f) / (f @ f) * f
    norm = lambda y: F.rms_norm(y, (D,))
    uncapped = lambda y: lm.module.lm_head(norm(y - (x - f)))[: encoding().n_vocab]
    numeric = (uncapped(x + 1e-2 * d) - uncapped(x - 1e-2 * d)) / 2e-2
    scale = f.square().mean().sqrt()
    torch.testing.assert_close(numeric * scale, lm.logit_effects(d[None])[0], rtol=1e-2, atol=1e-2)
    assert lm.logit_effects(torch.zeros(1, 4 * D)) is None


def test_between_attention_and_mlp_lies_no_module(base):
    lm = load_language_model("nanochat:base", device="cpu")
    for asked in ({"layers": [1], "hook_type": "resid_mid"}, {"hookpoints": ["blocks.1.hook_resid_mid"]}):
        with pytest.raises(UserError, match="no module of this model reads the stream between attention and MLP; use "):
            resolve(lm.module, **asked)


def test_tokens(base):
    t = load_language_model("nanochat:base", device="cpu").tokenizer
    enc = encoding()
    assert (t.vocab_size, t.bos_id) == (enc.n_vocab, enc.encode_single_token("<|bos|>"))
    assert t.special_ids == {enc.encode_single_token(name) for name in SPECIALS}
    assert t.encode_document("alpha") == [t.bos_id, *t.encode("alpha")]
    assert not set(t.encode("<|bos|>")) & t.special_ids  # text never becomes a special token
    assert [t.token_str(i) for i in t.encode("al\u00e9\n")] == ["al", r"\xc3", r"\xa9", "\n"]
    assert t.token_str(t.bos_id) == "<|bos|>"
    assert t.token_str(10_000) == "<10000>"
    text = "alpha \u00e9 mu " * 3
    assert t.decode(t.encode(text)) == text
    long = "mu " * 400_000
    assert t.decode(t.encode(long)) == long
    chat = [{"role": "user", "content": "alpha" * 1000}, {"role": "assistant", "content": "mu"}]
    shown = [t.token_str(i) for i in t.encode_document(chat)]
    assert shown[:2] == ["<|bos|>", "<|user_start|>"]
    assert shown[-4:] == ["<|user_end|>", "<|assistant_start|>", "mu", "<|assistant_end|>"]  # whole, however long
    for bad in ([{"role": "assistant", "content": "x"}], [{"role": "user"}], [{"role": "user", "content": 3}]):
        with pytest.raises(ValueError, match="nanochat cannot render a chat"):
            t.encode_document(bad)
    again = load_language_model("nanochat:base", device="cpu").tokenizer
    assert t.content_hash() == again.content_hash()
    again.enc = tiktoken.Encoding("other", pat_str=r".", mergeable_ranks=enc._mergeable_ranks, special_tokens={})
    assert t.content_hash() != again.content_hash()


SMALL = "--k 4 --batch_size 64 --buffer_tokens 256 --max_tokens 640 --val_tokens 200 --ctx_len 32 --device cpu".split()


def test_train_and_eval(base, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = ["--dataset", str(text_file)]
    sae_train.main(["--model", "nanochat:base", "--layer", "1", *text, *SMALL])
    sae_eval.main(["--eval_tokens", "300"])
    report = json.loads((tmp_path / "sae_models" / "layer_1" / "eval.json").read_text())
    assert report["hookpoint"] == "transformer.h.1"
    assert report["n_tokens"] >= 300
    assert report["ce_clean"] > 0
    assert report["ce_zero"] != report["ce_clean"]
    sae = store.load_sae(tmp_path / "sae_models" / "layer_1")
    assert (sae.d_in, sae.d_sae) == (D, 8 * D)
    # collected once, trained on later: the cache knows its model again
    collect = ["--model", str(base), "--layer", "2", "--hook_type", "resid_pre", "--max_tokens", "2000"]
    sae_collect.main([*collect, *text, "--ctx_len", "32", "--output_dir", "cache"])
    sae_train.main(["--activations", "cache", "--run_name", "cached", *SMALL[:6]])
    sae_eval.main(["--sae_path", "sae_models/cached", "--eval_tokens", "300"])


@pytest.mark.parametrize(
    ("nanochat", "asked"),
    [(None, "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")],
    indirect=["nanochat"],
)
def test_activations_in_bfloat16(nanochat, asked, base, text_file):
    """In its weights where nanochat leaves that open, and where it does not, as it chooses itself, on a GPU say."""
    lm = load_language_model("nanochat:base", device="cpu", dtype=asked)
    assert lm.dtype == "bfloat16"
    ids, valid = batch(lm)
    for hook_type in HOOK_TYPES:
        name = at_layer(lm.module, 1, hook_type)
        x = lm.hidden(ids, valid, [name])[name]
        assert x.dtype == torch.bfloat16
        assert torch.equal(lm.logits_replacing(ids, valid, name, x), lm.logits(ids, valid))
    sae = create_sae(SAEConfig(d_in=D, k=4), generator=torch.Generator().manual_seed(0))
    report, _ = evaluate(sae, "transformer.h.1", TokenRows(lm, open_dataset(str(text_file)), "val", 32), 200)
    assert 0 < report["ce_clean"] < float("inf")
    assert report["ce_zero"] != report["ce_clean"]


def test_half_precision_leaves_the_rotary_tables_alone(base):
    module = load_language_model("nanochat:base", device="cpu", dtype="float16").module
    assert {p.dtype for p in module.parameters()} == {torch.float16}
    assert (module.cos.dtype, module.sin.dtype) == (torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("nanochat", ["float32"], indirect=True)
def test_a_nanochat_that_chooses_its_dtype_is_not_overruled(nanochat, base):
    assert load_language_model("nanochat:base", device="cpu").dtype == "float32"
    with pytest.raises(UserError, match="computes in float32; set NANOCHAT_DTYPE=bfloat16"):
        load_language_model("nanochat:base", device="cpu", dtype="bfloat16")


def test_missing_things_are_one_sentence(base, nanochat, monkeypatch):
    root = base.parent.parent
    (root / "chatrl_checkpoints").mkdir()
    for name, words in (
        ("nanochat:base/d9", "No checkpoints found in"),
        ("nanochat:base/d2@6", "model_000006.pt"),
        ("nanochat:rl", "No checkpoints found in"),
        ("nanochat:sft", "chatsft_checkpoints"),
        ("nanochat:mud", "KeyError('mud')"),
        ("nanochat:", "names no nanochat model; give nanochat:base"),
        ("nanochat:base/../../elsewhere", "names no nanochat model"),
        ("nanochat:base/..", "names no nanochat model"),
        ("nanochat:base/d2@last", "names no nanochat model"),
    ):
        with pytest.raises(UserError) as e:
            load_language_model(name, device="cpu")
        assert words in str(e.value)
        assert len(str(e.value).splitlines()) == 1
    write(nanochat, root / "small", 1, vocab_size=100)
    with pytest.raises(UserError, match="cannot load '.*small.*belong to this checkout"):
        load_language_model(str(root / "small"), device="cpu")
    (base / "meta_000500.json").unlink()
    with pytest.raises(UserError, match="but not meta_000500.json"):
        load_language_model(str(base), device="cpu")
    with pytest.raises(UserError, match="wanted nanoGPT's model and model_args"):
        load_language_model(str(base / "model_000500.pt"), device="cpu")


@pytest.mark.parametrize("by_name", [False, True])
def test_truncated_files_are_one_sentence(base, by_name):
    name = "nanochat:base" if by_name else str(base)
    weights, meta = base / "model_000500.pt", base / "meta_000500.json"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:10], b""):
        weights.write_bytes(damaged)
        with pytest.raises(UserError) as e:
            load_language_model(name, device="cpu")
        assert len(str(e.value).splitlines()) == 1
        assert by_name or "is damaged, cut short or no .pt file" in str(e.value)
    weights.write_bytes(whole)
    meta.write_text("{")
    with pytest.raises(UserError, match="cannot load"):
        load_language_model(name, device="cpu")


def test_a_folder_of_a_stranger_runs_nothing(base, tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return (open, (str(marker), "w"))

    torch.save({"wte": Evil()}, base / "model_000500.pt")
    for name in ("tokenizer.pkl", "meta.pkl"):
        (base / name).write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="refused: it wants to run code"):
        load_language_model(str(base), device="cpu")
    (base / "model_000500.pt").write_bytes(pickle.dumps({"wte": Evil()}))
    with pytest.raises(UserError, match="model_000500"):
        load_language_model(str(base), device="cpu")
    assert not marker.exists()


def test_without_nanochat(base, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "nanochat"]:
        del sys.modules[name]
    (tmp_path / "checkout" / "nanochat" / "checkpoint_manager.py").write_text("import rustbpe_that_is_not_there")
    with pytest.raises(UserError, match=r"cannot be imported \(No module named 'rustbpe.*its checkout"):
        load_language_model("nanochat:base", device="cpu")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path / "checkout")])
    del sys.modules["nanochat"]
    for name in ("nanochat:base", str(base)):
        with pytest.raises(UserError, match=r"put its checkout on the path \(PYTHONPATH=path/to/nanochat\)"):
            load_language_model(name, device="cpu")
