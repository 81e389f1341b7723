"""Documents become token rows: held-out text is never trained on, one bos a document, padding never counts, any place
can be gone on from, and threads change nothing.

Run: python -m pytest tests/data/test_tokens.py
"""

import itertools
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from sae.config import UserError
from sae.data import tokens
from sae.data.activations import ModelSource, Stream, gather
from sae.data.datasets import Dataset, open_dataset
from sae.data.tokens import HOLD_OUT, TokenRows, documents_of_split, kept_positions
from sae.evaluator import evaluate
from sae.lm.language_model import LanguageModel, load_language_model
from sae.lm.tokenizers import HFTokenizer
from sae.models import SAEConfig, create_sae
from tests.conftest import make_text

CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "alpha beta"},
    {"role": "assistant", "content": "gamma delta"},
]


def dataset_of(*documents, has_split=True) -> Dataset:
    return Dataset("given", has_split, lambda _: iter(documents), lambda: "0" * 64)


def all_rows(rows, n=7):
    """All that is left, as lists without padding."""
    out = []
    while len((batch := rows.take(n))[0]):
        out += [ids[valid].tolist() for ids, valid, _ in zip(*batch, strict=True)]
    return out


def read(lm, dataset, split="train", ctx_len=16, **kwargs):
    return list(itertools.chain.from_iterable(all_rows(TokenRows(lm, dataset, split, ctx_len, **kwargs))))


# ------------------------------------------------------------------------------------------------ the held-out part


def test_packing_loses_nothing_and_keeps_documents_apart(lm):
    docs = [make_text(n, seed=n) for n in (40, 3, 200)]
    got = read(lm, dataset_of(*docs))
    assert got == [t for d in docs for t in lm.tokenizer.encode_document(d)]
    assert got.count(lm.tokenizer.bos_id) == 3


def test_every_twentieth_piece_is_held_out_and_nothing_is_lost(monkeypatch):
    monkeypatch.setattr(tokens, "PIECE_CHARS", 100)
    lines = [f"this is line {i} of the long text\n" for i in range(1000)]
    short = [f"a short document, number {i}" for i in range(70)]
    ids = np.arange(10_000)
    for documents in (["".join(lines)], short, [ids], [short[0], "".join(lines), *short, ids]):
        dataset = dataset_of(*documents, has_split=False)
        train, val = (list(documents_of_split(dataset, split)) for split in ("train", "val"))
        n_chars = lambda parts: sum(len(p) * (4 if isinstance(p, np.ndarray) else 1) for p in parts)
        assert 0.03 < n_chars(val) / n_chars(documents) < 0.08
        assert n_chars(train) + n_chars(val) == n_chars(documents)
        whole = lambda parts: sorted(line for p in parts if isinstance(p, str) for line in p.splitlines())
        assert whole([*train, *val]) == whole(documents)  # cut at line ends: no line is in both, or in two parts
        numbers = [i for p in (*train, *val) if isinstance(p, np.ndarray) for i in p]
        assert sorted(numbers) == (list(range(10_000)) if ids is documents[-1] else [])
    train = list(documents_of_split(dataset_of("".join(lines), has_split=False), "train"))
    assert len(train) < len("".join(lines)) / 100 / 10  # neighbours stay in one part


@pytest.mark.parametrize("text", ["a b c " * 30_000, "a" * 100_000, "\n" * 50_000, "word\n" * 3000])
def test_texts_of_odd_shapes_are_cut_too(text):
    dataset = dataset_of(text, has_split=False)
    train, val = (list(documents_of_split(dataset, split)) for split in ("train", "val"))
    assert len("".join(train)) + len("".join(val)) == len(text)
    assert all(part in text for part in (*train, *val))
    assert 0 < len("".join(val)) < len(text) / 2


def test_a_short_text_has_held_out_text_too(lm, tmp_path):
    (tmp_path / "t.txt").write_text(make_text(4000))  # three pieces
    dataset = open_dataset(str(tmp_path / "t.txt"))
    assert len(read(lm, dataset, "val")) > 1000
    assert len(read(lm, dataset, "train")) > len(read(lm, dataset, "val"))


def test_held_out_text_is_the_same_for_every_context_length(lm, text_file):
    dataset = open_dataset(str(text_file))
    texts = {}
    for ctx_len in (8, 33, 64):
        for split in ("train", "val"):
            texts[split, ctx_len] = lm.tokenizer.decode(read(lm, dataset, split, ctx_len))
    for ctx_len in (8, 33):
        assert texts["val", ctx_len] == texts["val", 64]
        assert texts["train", ctx_len] == texts["train", 64]


def test_no_training_text_is_validated_on(lm, tmp_path):
    """By content: documents that say which they are."""
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": f"alpha {i} beta"}) + "\n" for i in range(200)))
    dataset = open_dataset(str(tmp_path / "d.jsonl"))
    found = {}
    for split, ctx_len in (("train", 16), ("val", 8), ("val", 31)):
        rows = read(lm, dataset, split, ctx_len)
        found[split, ctx_len] = set(lm.tokenizer.decode(rows).replace("<|bos|>", "\n").split("\n")) - {""}
    assert found["val", 8] == found["val", 31] == {f"alpha {i} beta" for i in range(1, 200, HOLD_OUT)}
    assert not found["train", 16] & found["val", 8]
    assert len(found["train", 16] | found["val", 8]) == 200


def test_a_split_of_its_own_is_taken_whole(lm):
    dataset = Dataset("d", True, lambda split: iter([split] * 30), lambda: "")
    for split in ("train", "val"):
        assert list(documents_of_split(dataset, split)) == [split] * 30


def test_a_huge_document_is_encoded_in_parts(lm, monkeypatch):
    monkeypatch.setattr(tokens, "LONGEST_CHARS", 1000)
    text = make_text(2000)
    parts = list(documents_of_split(dataset_of(text), "train"))
    assert "".join(parts) == text
    assert max(map(len, parts)) < 2000
    assert [d.tolist() for d in documents_of_split(dataset_of(np.arange(600)), "train")] == [
        list(range(250)),
        list(range(250, 600)),
    ]
    chat = [{"role": "user", "content": text}]
    assert list(documents_of_split(dataset_of(chat), "train")) == [chat]


# ------------------------------------------------------------------------------------------------ places and threads


@pytest.mark.parametrize("n_threads", [1, 3])
def test_resume_at_any_row(lm, n_threads):
    dataset = dataset_of(*(make_text(5 + 31 * i % 90, seed=i) for i in range(400)), has_split=False)
    want = all_rows(TokenRows(lm, dataset, "train", 16))
    reader = TokenRows(lm, dataset, "train", 16, n_threads=n_threads)
    head = reader.take(13)[0].tolist()
    for _ in range(20):
        state = json.loads(json.dumps(reader.state_dict()))  # plain data
        head += reader.take(61)[0].tolist()
    other = TokenRows(lm, dataset, "train", 16, n_threads=4 - n_threads)
    other.load_state_dict(state)
    assert len(head) < len(want)
    assert head[:-61] + all_rows(other) == want
    assert other.n_rows == len(want)
    other.rewind()
    assert all_rows(other, 3) == want


def test_threads_change_nothing(lm, monkeypatch):
    monkeypatch.setattr(tokens, "BATCH_DOCUMENTS", 4)
    documents = [make_text(1 + 37 * i % 200, seed=i) for i in range(300)]
    documents[7], documents[11] = CHAT, np.arange(50)
    want = read(lm, dataset_of(*documents))
    seen = set()
    encode = lm.tokenizer.encode
    monkeypatch.setattr(lm.tokenizer, "encode", lambda text: (seen.add(threading.get_ident()), encode(text))[1])
    for n in (2, 5):
        assert read(lm, dataset_of(*documents), n_threads=n) == want
    assert len(seen) > 2


@pytest.mark.parametrize("n_threads", [1, 2])
def test_an_error_comes_when_its_document_does(lm, tmp_path, n_threads):
    lines = [json.dumps({"text": "alpha " * 50})] * 30 + ["not json"] + [json.dumps({"text": "x"})] * 10
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    dataset = open_dataset(str(tmp_path / "d.jsonl"))
    rows = TokenRows(lm, dataset, "train", 16, n_threads=n_threads)
    n = len(lm.tokenizer.encode_document("alpha " * 50)) * 28 // 16
    assert len(rows.take(n)[0]) == n
    with pytest.raises(UserError, match=r"d.jsonl:31 is not json"):
        rows.take(5)


def test_an_endless_text_needs_no_length(lm):
    endless = Dataset("e", False, lambda _: (f"alpha {i}. " * 200 for i in itertools.count()), lambda: "")
    source = ModelSource(TokenRows(lm, endless, "train", 32, n_threads=2), ["transformer.h.0"])
    stream = Stream(source, n_tokens=2000, batch_size=100, buffer_tokens=400)
    assert sum(len(batch["transformer.h.0"]) for batch in stream) == 2000
    assert stream.n_passes == 0
    val = ModelSource(TokenRows(lm, endless, "val", 32), ["transformer.h.0"])
    assert len(gather(val, 500, "t")["transformer.h.0"]) == 500


def test_passes_over_the_data_are_counted(lm):
    document = "alpha beta " * 40
    n = len(lm.tokenizer.encode(document))
    source = lambda: ModelSource(TokenRows(lm, dataset_of(document), "train", 64), ["transformer.h.0"])
    for n_tokens, n_passes in ((n, 0), (n + 1, 1), (3 * n, 2), (3 * n + 1, 3)):
        stream = Stream(source(), n_tokens=n_tokens, batch_size=1, buffer_tokens=8)
        assert sum(1 for _ in stream) == n_tokens
        assert stream.n_passes == n_passes


# ------------------------------------------------------------------------------------------------ bos, eos, padding


def byte_level(*specials) -> Tokenizer:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(specials), initial_alphabet=alphabet)
    inner.train_from_iterator([make_text(500)], trainer)
    return inner


def gpt2_like():
    """One token begins, ends and pads; no template."""
    end = "<|endoftext|>"
    fast = transformers.PreTrainedTokenizerFast
    return fast(tokenizer_object=byte_level(end), bos_token=end, eos_token=end, pad_token=end)


def llama_like():
    """A post-processor that adds bos, and a template that writes it too."""
    inner = byte_level("<s>", "</s>", "<|role|>")
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
        "<|role|>{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    )
    return tokenizer


def qwen_like():
    """No bos; a template that ends each turn."""
    inner = byte_level("<|im_end|>", "<|endoftext|>")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    return tokenizer


def bert_like():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ":", "user", "assistant", "alpha", "beta", "gamma", "delta"]
    inner = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    inner.enable_truncation(4)  # as published ones have it
    inner.enable_padding(length=4)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, mask_token="[MASK]", **names)


def model_with(tokenizer, *, wrap=None, pad_id=0):
    """What TokenRows asks of a model, around a HuggingFace tokenizer."""
    parts = {"tokenizer": HFTokenizer(tokenizer), "max_len": 64, "wrap": wrap, "pad_id": pad_id, "name": "m"}
    return SimpleNamespace(**parts)


@pytest.mark.parametrize("make", [gpt2_like, llama_like])
def test_one_bos_begins_a_document_and_none_is_doubled(make):
    model = model_with(make())
    bos, t = model.tokenizer.bos_id, model.tokenizer
    written = t.inner.bos_token
    documents = [
        "alpha beta",
        CHAT,
        f"{written}gamma",
        CHAT[1:],
        "delta" + (written if t.inner.eos_token_id == bos else ""),  # it ends as the next one begins
        "epsilon",
    ]
    got = read(model, dataset_of(*documents))
    assert got.count(bos) == len(documents)
    starts = [i for i, token in enumerate(got) if token == bos]
    assert starts[0] == 0
    assert all(b - a > 1 for a, b in itertools.pairwise(starts))
    assert got[: starts[1]] == [bos, *t.encode("alpha beta")]
    assert t.decode(got[starts[2] : starts[3]]) == written + "gamma"


def test_a_chat_is_rendered_by_its_template_or_as_lines(capsys):
    lines = "system: be kind\nuser: alpha beta\nassistant: gamma delta\n"
    gpt2 = HFTokenizer(gpt2_like())
    assert gpt2.decode(gpt2.encode_document(CHAT)[1:]) == lines
    llama = HFTokenizer(llama_like())
    want = "<s><|role|>system: be kind</s><|role|>user: alpha beta</s><|role|>assistant: gamma delta</s>"
    assert llama.decode(llama.encode_document(CHAT)) == want
    assert {"<s>", "</s>", "<|role|>"} == {llama.token_str(i) for i in llama.special_ids}
    # what the template refuses is said once, and read as lines
    refused = [*CHAT, {"role": "tool", "content": "zeta"}]
    for _ in range(2):
        assert llama.decode(llama.encode_document(refused)) == "<s>" + lines + "tool: zeta\n"
    assert capsys.readouterr().out.count("refuses some chats (no tools)") == 1
    # a system message goes to the user where a template has no place for it
    llama.inner.chat_template = "{% if messages[0].role == 'system' %}{{ 1 / 0 }}{{ raise_exception('x') }}{% endif %}"
    llama.inner.chat_template = llama.inner.chat_template.replace("{{ 1 / 0 }}", "") + "{{ messages[0].content }}"
    assert llama.decode(llama.encode_document(CHAT)) == "<s>be kind\n\nalpha beta"


def test_without_a_bos_one_eos_ends_a_document():
    model = model_with(qwen_like())
    eos = model.tokenizer.inner.eos_token_id
    got = read(model, dataset_of("alpha", "beta<|im_end|>", CHAT[1:]))
    ends = [i for i, token in enumerate(got) if token == eos]
    assert model.tokenizer.decode(got) == (
        "alpha<|im_end|>beta<|im_end|>user\nalpha beta<|im_end|>\nassistant\ngamma delta<|im_end|>\n"
    )
    assert len(ends) == 4


def test_a_template_writes_no_date():
    tokenizer = llama_like()
    tokenizer.chat_template = "{% if not date_string is defined %}{{ strftime_now('%Y') }}{% endif %}{{ date_string }}"
    assert HFTokenizer(tokenizer).render_chat(CHAT) == "26 Jul 2024"  # another one tomorrow would be another text


@pytest.mark.parametrize("make", [gpt2_like, llama_like, qwen_like, bert_like])
def test_encoding_is_transformers_own(make):
    tokenizer = make()
    for text in ("", " ", "alpha  beta\n\n", "caf\u00e9 \u65e5\u672c", "a</s>b<|endoftext|>[SEP]", make_text(300)):
        assert HFTokenizer(tokenizer).encode(text) == make().encode(text, add_special_tokens=False)
    assert HFTokenizer(tokenizer).encode("a\ud800b") == HFTokenizer(tokenizer).encode("a?b")  # half a character


def test_an_encoder_gets_wrapped_pieces(minilm_path):
    lm = load_language_model(minilm_path, device="cpu")
    ids, valid, _ = TokenRows(lm, dataset_of("one two three four five six seven", "eight"), "train", 6).take(10)
    assert ids[0, 0] == 101
    assert ids[0, 5] == 102
    assert [int(v.sum()) for v in valid] == [6, 5, 3]  # 4 + 3 words, then the other document by itself
    assert not (ids[~valid] != lm.pad_id).any()
    keep = kept_positions(lm, ids, valid)
    assert int(keep.sum()) == 8  # no [CLS], [SEP] or padding


@pytest.mark.parametrize("n_threads", [1, 2])
def test_what_is_wrapped_already_is_not_wrapped_again(n_threads):
    model = model_with(bert_like(), wrap=(2, 3))
    documents = ["alpha beta", np.array([2, 8, 9, 10, 11, 8, 3]), CHAT[1:], np.array([2, 3]), np.array([9])]
    rows = all_rows(TokenRows(model, dataset_of(*documents), "train", 6, n_threads=n_threads))
    chat = [6, 5, 8, 9, 7, 5, 10, 11]
    assert rows == [[2, 8, 9, 3], [2, 8, 9, 10, 11, 3], [2, 8, 3], [2, *chat[:4], 3], [2, *chat[4:], 3], [2, 9, 3]]


def test_padding_that_is_also_the_end_of_a_text_never_counts():
    """GPT-2's habit: one token for both. The real one is part of the text, the padding is nothing."""
    torch.manual_seed(0)
    tokenizer = gpt2_like()
    end = tokenizer.eos_token_id
    config = transformers.GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=64)
    module = transformers.GPT2LMHeadModel(config)
    forward = lambda module, ids, valid: module(input_ids=ids, attention_mask=valid.long()).logits
    parts = {"forward_fn": forward, "name": "m", "d_model": 16, "max_len": 64, "pad_id": end}
    lm = LanguageModel(module=module, tokenizer=HFTokenizer(tokenizer), **parts)
    documents = ["alpha beta gamma delta", "epsilon zeta"]
    want = [t for d in documents for t in [end, *lm.tokenizer.encode(d)]]
    ids, valid, _ = TokenRows(lm, dataset_of(*documents), "train", len(want) + 5).take(3)
    assert ids.shape == (1, len(want) + 5)
    assert ids[0, len(want) :].tolist() == [end] * 5
    assert valid[0].tolist() == [True] * len(want) + [False] * 5
    keep = kept_positions(lm, ids, valid)
    assert int(keep.sum()) == len(want) - 2
    hook = "transformer.h.0"
    padded = lm.hidden(ids, valid, [hook])[hook][0, : len(want)]
    alone = lm.hidden(torch.tensor([want]), torch.ones(1, len(want), dtype=torch.bool), [hook])[hook][0]
    torch.testing.assert_close(padded, alone)
    # a last row with less than two tokens says nothing and is left out
    assert len(all_rows(TokenRows(lm, dataset_of(*documents), "train", len(want) - 1))) == 1


# ------------------------------------------------------------------------------------------------ which positions count


def test_kept_positions(lm):
    bos = lm.tokenizer.bos_id
    ids = torch.tensor([[bos, 5, 6, bos, 7]])
    valid = torch.tensor([[True, True, True, True, False]])
    assert kept_positions(lm, ids, valid).tolist() == [[False, True, True, False, False]]
    assert kept_positions(lm, ids, valid, exclude_tokens=(6, 7)).tolist() == [[False, True, False, False, False]]
    ids[0, 0] = 9
    assert kept_positions(lm, ids, valid, skip_first=True).tolist() == [[False, True, True, False, False]]
    for token in (-1, lm.tokenizer.vocab_size):
        with pytest.raises(
            UserError, match=f"token {token} cannot be excluded.*knows 0 to {lm.tokenizer.vocab_size - 1}"
        ):
            kept_positions(lm, ids, valid, exclude_tokens=(5, token))


def test_excluded_tokens_are_neither_trained_on_nor_measured(lm, text_file):
    dataset, hook = open_dataset(str(text_file)), "transformer.h.1"
    ids, valid, _ = TokenRows(lm, dataset, "val", 32).take(20)
    token = int(ids.flatten().mode().values)
    sae = create_sae(SAEConfig(d_in=32, k=4, hook_point=hook))
    texts = [TokenRows(lm, dataset, "val", 32, exclude_tokens=x) for x in ((), (token,))]
    all_of, without = (evaluate(sae, hook, text, 500, mean_tokens=100)[0] for text in texts)
    assert without["n_tokens"] >= 500
    assert without["explained_variance"] != all_of["explained_variance"]
    source = ModelSource(TokenRows(lm, dataset, "val", 32, exclude_tokens=(token,)), [hook], model_batch_size=20)
    keep = kept_positions(lm, ids, valid) & (ids != token)
    torch.testing.assert_close(source.read()[hook], lm.hidden(ids, valid, [hook])[hook][keep])


# ------------------------------------------------------------------------------------------------ bad data


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.bin", b"\x00", "odd number of bytes"),
        ("x.bin", np.full(100, 9999, np.uint16).tobytes(), "holds token 9999 and the model knows 293"),
        ("x.jsonl", b'{"input_ids": [5, -100]}\n', "holds token -100 and the model knows 293"),
        ("x.jsonl", b'[{"role": "tool", "content": "x"}]', "is no chat message"),
    ],
)
def test_bad_data_is_one_sentence(lm, tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as e:
        TokenRows(lm, open_dataset(str(tmp_path / name)), "train", 16).take(5)
    assert words in str(e.value)
    assert len(str(e.value).splitlines()) == 1


def test_a_character_the_model_does_not_know(tmp_path, gpt_path):
    import pickle
    import shutil

    shutil.copy(gpt_path, tmp_path / "ckpt.pt")
    chars = {c: i for i, c in enumerate("abc")}
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 3, "stoi": chars, "itos": dict(enumerate("abc"))}))
    lm = load_language_model(str(tmp_path / "ckpt.pt"), device="cpu")
    (tmp_path / "t.txt").write_text("abcz")
    with pytest.raises(UserError, match="'z'"):
        TokenRows(lm, open_dataset(str(tmp_path / "t.txt")), "train", 2).take(1)
