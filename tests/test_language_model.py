"""One interface over pygpt, nanoGPT checkpoints and HuggingFace models, decoder and encoder; bad files in one sentence.

Run: python -m pytest tests/test_language_model.py
"""

import pickle
import shutil

import pytest
import torch
from torch.nn import functional as F

from sae import hooks
from sae.config import UserError
from sae.language_model import ROOT, HFTokenizer, LanguageModel, beside, best_device, load_language_model


def batch(lm, n=2, t=16):
    ids = torch.randint(0, 300, (n, t), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids, dtype=torch.bool)


def test_nanogpt(lm, gpt_folder):
    assert (lm.d_model, lm.n_layers, lm.max_len, lm.causal) == (32, 3, 64, True)
    ids, valid = batch(lm)
    logits = lm.logits(ids, valid)
    assert logits.shape == (2, 16, 320)
    seen = lm.hidden(ids, valid, ["transformer.h.0", "transformer.h.2"])
    norm = lm.module.transformer.ln_f
    torch.testing.assert_close(seen["transformer.h.2"] @ torch.eye(32), seen["transformer.h.2"])
    torch.testing.assert_close(lm.module.lm_head(norm(seen["transformer.h.2"])), logits)
    assert lm.width("transformer.h.1.mlp.c_proj@in") == 128
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
    assert (lm.d_model, lm.n_layers, lm.max_len, lm.causal, lm.has_head) == (16, 2, 32, True, True)
    ids = torch.randint(0, 50, (2, 8))
    with torch.no_grad():
        torch.testing.assert_close(lm.logits(ids, torch.ones_like(ids).bool()), hf(ids).logits)
    assert set(lm.hidden(ids, torch.ones_like(ids).bool(), ["transformer.h.0"])) == {"transformer.h.0"}
    assert lm.unembedding.shape == (50, 16)
    assert lm.tokenizer.encode_document("ab")[0] == lm.tokenizer.bos_id


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
    assert (lm.d_model, lm.n_layers, lm.causal, lm.has_head) == (384, 6, False, False)
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
    assert lm.tokenizer.token_str(lm.tokenizer.encode("unaffable")[1]).startswith("##")


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
    with pytest.raises(UserError):
        load_language_model(str(tmp_path / "ckpt.pt"), device="cpu")
    torch.save({"model": Evil(), "model_args": {}}, tmp_path / "zip.pt")
    with pytest.raises(UserError):
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


def test_any_module_with_a_tokenizer(lm):
    """What load_language_model returns can be built by hand around any nn.Module."""
    mine = LanguageModel(
        module=lm.module, tokenizer=lm.tokenizer, forward_fn=lambda m, ids, _valid: m(ids)[0],
        name="mine", d_model=32, max_len=64,
    )  # fmt: skip
    ids, valid = batch(lm)
    torch.testing.assert_close(mine.logits(ids, valid), lm.logits(ids, valid))


def test_devices():
    assert best_device("cpu").type == "cpu"
    for name in ("gpuu", "cuda:99"):
        with pytest.raises(UserError, match="try --device cpu"):
            best_device(name)
    with pytest.raises(UserError, match="is not beside"):
        beside("no_such_file.py")
