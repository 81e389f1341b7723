"""One small interface over pygpt, nanoGPT checkpoints and HuggingFace models: tokens in, hidden states and logits out.

The only file that imports those models, and only when asked for. Knows nothing of SAEs; the hooks place themselves on
`LanguageModel.module`.

Letters: N sequences, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from sae import hooks
from sae.config import UserError, read_json

ROOT = Path(__file__).resolve().parent.parent
PYGPT = ROOT / "assets" / "pygpt"
# Where families keep the norm before the unembedding; the first that exists is taken.
FINAL_NORMS = (
    "transformer.ln_f", "model.norm", "gpt_neox.final_layer_norm", "model.decoder.final_layer_norm",
    "model.final_layernorm",
)  # fmt: skip


def beside(path: str) -> ModuleType:
    """Import a python file of the repository that sae/ lies in (model.py of pygpt, or of anyone's nanoGPT)."""
    file = ROOT / path
    name = file.stem
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(file):
        return loaded
    if not file.is_file():
        raise UserError(f"'{path}' is not beside the sae folder; run from a clone of the repository")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(name, module)
    spec.loader.exec_module(module)
    return module


def best_device(name: str | None = None) -> torch.device:
    """The device asked for, else cuda where there is one, else cpu (mps only by name: it was never run there)."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device '{name}' is not there ({str(e).splitlines()[0]}); try --device cpu") from e
    return device


@dataclass
class LanguageModel:
    """A model, its tokenizer and what the rest of the package must know of them.

    module:     any nn.Module; its submodules are the hookpoints
    tokenizer:  encode, encode_document, token_str, special_ids, content_hash as in tokenizer.py
    forward_fn: (module, ids (N, T), valid (N, T) bool) -> logits (N, T, V), or None for a model without a head
    causal:     next-token model (rows packed from documents) or encoder (each row wrapped in `wrap`)
    resume_fn:  (module, hookpoint, x (N, T, D)) -> logits from there on, or None where it cannot; a shortcut only
    """

    module: nn.Module
    tokenizer: Any
    forward_fn: Callable[[nn.Module, Tensor, Tensor], Tensor | None]
    name: str
    d_model: int
    max_len: int
    causal: bool = True
    has_head: bool = True
    wrap: tuple[int, int] | None = None
    pad_id: int = 0
    resume_fn: Callable[[nn.Module, str, Tensor], Tensor | None] | None = None

    def __post_init__(self) -> None:
        self.module.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def n_layers(self) -> int:
        return hooks.n_layers(self.module)

    @torch.no_grad()
    def logits(self, ids: Tensor, valid: Tensor) -> Tensor | None:
        """(N, T, V) logits of every position, or None for a model without a head. valid bool: not padding."""
        return self.forward_fn(self.module, ids.to(self.device), valid.to(self.device))

    @torch.no_grad()
    def hidden(self, ids: Tensor, valid: Tensor, hookpoints: Sequence[str]) -> dict[str, Tensor]:
        """What the hookpoints hold, (N, T, D) each; the forward stops after the last of them."""
        ids, valid = ids.to(self.device), valid.to(self.device)
        return hooks.run(self.module, hookpoints, lambda: self.forward_fn(self.module, ids, valid))

    @torch.no_grad()
    def logits_replacing(self, ids: Tensor, valid: Tensor, hookpoint: str, x: Tensor) -> Tensor | None:
        """Logits of a forward in which the hookpoint holds x (N, T, D) instead of what it would."""
        logits = self.resume_fn(self.module, hookpoint, x) if self.resume_fn is not None else None
        if logits is None:
            with hooks.replace(self.module, {hookpoint: lambda _: x}):
                logits = self.logits(ids, valid)
        return logits

    def width(self, hookpoint: str) -> int:
        """Width of what a hookpoint holds, from one tiny forward."""
        ids = torch.full((1, 2), max(0, self.pad_id), dtype=torch.int64)
        x = self.hidden(ids, torch.ones_like(ids, dtype=torch.bool), [hookpoint])[hookpoint]
        if x.ndim != 3 or x.shape[:2] != ids.shape or not x.is_floating_point():
            raise UserError(
                f"'{hookpoint}' holds {x.dtype} of shape {tuple(x.shape)}, not one vector a token; choose another"
            )
        return x.shape[-1]

    @cached_property
    def _final_norm(self) -> nn.Module | None:
        names = dict(self.module.named_modules())
        return next((names[n] for n in FINAL_NORMS if n in names), None)

    @cached_property
    def unembedding(self) -> Tensor | None:
        """(V, D): the map from the last residual stream to logits, with the final norm's gain folded in; or None."""
        head = getattr(self.module, "lm_head", None) or getattr(self.module, "embed_out", None)
        weight = getattr(head, "weight", None)
        if weight is None or weight.shape[1] != self.d_model:
            return None
        gain = getattr(self._final_norm, "weight", None)
        weight = weight.detach().float()
        if gain is None:
            return weight
        # Gemma's norms store their gain as a difference from 1
        shift = 1.0 if "Gemma" in type(self._final_norm).__name__ else 0.0
        return weight * (gain.detach().float() + shift)

    @torch.no_grad()
    def logit_effects(self, directions: Tensor) -> Tensor | None:
        """(n, V): how directions (n, D) added to the last residual stream move the logits, up to the norm's scale.

        Through the final norm's gain; a LayerNorm also removes the mean over D, an RMSNorm does not.
        """
        if self.unembedding is None or directions.shape[-1] != self.d_model:
            return None
        directions = directions.float()
        if self._final_norm is not None and "RMS" not in type(self._final_norm).__name__:
            directions = directions - directions.mean(-1, keepdim=True)
        return directions @ self.unembedding.to(directions.device).t()

    @cached_property
    def weights_hash(self) -> str:
        """sha256 of all weights by name, for provenance: equal for equal models whatever the device."""
        digest = hashlib.sha256()
        for name, w in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tuple(w.shape)} {w.dtype}".encode())
            digest.update(w.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def load_language_model(
    name: str = "pygpt", *, device: str | torch.device | None = None, dataset: str | None = None
) -> LanguageModel:
    """The model `name` means: pygpt, a nanoGPT ckpt.pt (or its folder), or a HuggingFace folder or id.

    dataset: a nanoGPT data folder, where a checkpoint's character table (meta.pkl) may lie.
    Raises UserError for a missing, truncated, foreign or hostile file; nothing in it is ever executed.
    """
    where = best_device(str(device) if device is not None else None)
    path = PYGPT if name == "pygpt" else Path(name)
    if path.is_dir() and (path / "ckpt.pt").is_file():
        return _nanogpt(path / "ckpt.pt", name, where, dataset)
    if path.is_file():
        return _nanogpt(path, name, where, dataset)
    if path.suffix in (".pt", ".pth", ".bin") or (path.parent != Path() and not path.exists() and name[0] in "./~"):
        raise UserError(f"model '{name}' does not exist; give a ckpt.pt, a HuggingFace folder or id, or pygpt")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"folder '{name}' holds neither a ckpt.pt nor a HuggingFace config.json; give another model")
    return _huggingface(name, where)


# --------------------------------------------------------------------------------------------------
# nanoGPT


def _nanogpt_forward(module: nn.Module, ids: Tensor, valid: Tensor) -> Tensor:
    del valid  # causal, padded on the right: padding cannot be seen
    return module(ids, ids)[0]  # nanoGPT's own model gives every position's logits only when it has targets


def _nanogpt_resume(module: nn.Module, hookpoint: str, x: Tensor) -> Tensor | None:
    """What follows block i depends on its output alone, so the blocks before it need not run again."""
    block = re.fullmatch(r"transformer\.h\.(\d+)", hookpoint)
    if block is None:
        return None
    parts: Any = module.transformer
    for layer in parts.h[int(block[1]) + 1 :]:
        x = layer(x)
    return module.get_submodule("lm_head")(parts.ln_f(x))


def _nanogpt(path: Path, name: str, device: torch.device, dataset: str | None) -> LanguageModel:
    model_py = beside("model.py")
    try:
        checkpoint = model_py.read_checkpoint(path)
        module = model_py.GPT.from_checkpoint_dict(checkpoint, str(path)).to(device)
    except (ValueError, OSError) as e:
        raise UserError(str(e)) from e
    config = module.config
    tokenizer = _nanogpt_tokenizer(path, checkpoint, dataset)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer knows {tokenizer.vocab_size} tokens and '{path}' only {config.vocab_size}; "
            "put the checkpoint's own tokenizer.json or meta.pkl beside it"
        )
    return LanguageModel(
        module=module, tokenizer=tokenizer, forward_fn=_nanogpt_forward, name=name,
        d_model=config.n_embd, max_len=config.block_size, resume_fn=_nanogpt_resume,
    )  # fmt: skip


def _nanogpt_tokenizer(path: Path, checkpoint: dict, dataset: str | None) -> Any:
    """The tokenizer beside the checkpoint, in the dataset's folder, or GPT-2's."""
    tokenizer_py = beside("tokenizer.py")
    trained_on = str(checkpoint.get("config", {}).get("dataset", ""))
    folders = [path.parent, *([Path(dataset)] if dataset else [])]
    folders += [Path("data") / trained_on, path.parent.parent / "data" / trained_on] if trained_on else []
    try:
        for folder in folders:
            if (folder / "tokenizer.json").is_file() or (folder / "meta.pkl").is_file():
                return tokenizer_py.load_tokenizer(folder)
        if checkpoint["model_args"]["vocab_size"] in (50257, 50304):
            return tokenizer_py.BPETokenizer.gpt2()
    except (ValueError, OSError) as e:
        raise UserError(str(e)) from e
    raise UserError(
        f"no tokenizer for '{path}'; put its tokenizer.json or meta.pkl beside it, "
        "or give the nanoGPT data folder as --dataset"
    )


# --------------------------------------------------------------------------------------------------
# HuggingFace


class HFTokenizer:
    """A HuggingFace tokenizer with the surface of tokenizer.py."""

    def __init__(self, inner: Any):
        self.inner = inner
        self.special_ids = frozenset(inner.all_special_ids)
        self.bos_id = inner.bos_token_id
        self.vocab_size = len(inner)

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False, verbose=False)

    def encode_document(self, document: str | Sequence[dict[str, str]]) -> list[int]:
        """bos before a text, or eos after it where the tokenizer has no bos, so that documents stay apart."""
        if not isinstance(document, str):
            document = "\n".join(m["content"] for m in document)
        ids = self.encode(document)
        if self.bos_id is not None:
            return [self.bos_id, *ids]
        return ids + ([self.inner.eos_token_id] if self.inner.eos_token_id is not None else [])

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(list(ids))

    def token_str(self, token_id: int) -> str:
        r"""A token as exact text: pieces of characters show as \xNN, word pieces without '##' begin a word."""
        token = self.inner.convert_ids_to_tokens(int(token_id))
        if token is None:
            return f"<{token_id}>"
        if token_id in self.special_ids:
            return token
        if self._byte_level:
            return bytes(self._bytes[c] for c in token).decode("utf-8", "backslashreplace")
        if len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)]).decode("utf-8", "backslashreplace")
        return token.replace("\u2581", " ")

    @cached_property
    def _bytes(self) -> dict[str, int]:
        """GPT-2's table: each byte has a printable stand-in."""
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        rest = [b for b in range(256) if b not in plain]
        return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}

    @cached_property
    def _byte_level(self) -> bool:
        vocab = self.inner.get_vocab()
        ordinary = [t for t, i in vocab.items() if i not in self.special_ids]
        return all(c in vocab for c in self._bytes) and all(c in self._bytes for t in ordinary for c in t)

    def content_hash(self) -> str:
        backend = getattr(self.inner, "backend_tokenizer", None)
        text = backend.to_str() if backend is not None else repr(sorted(self.inner.get_vocab().items()))
        return hashlib.sha256(text.encode()).hexdigest()


def _hf_forward(module: nn.Module, ids: Tensor, valid: Tensor) -> Tensor | None:
    return getattr(module(input_ids=ids, attention_mask=valid.long()), "logits", None)


def _huggingface(name: str, device: torch.device) -> LanguageModel:
    try:
        import transformers
    except ImportError as e:
        raise UserError(f"'{name}' needs transformers; run: pip install 'nanosae[hf]'") from e
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if (Path(name) / "config.json").is_file():
        read_json(Path(name) / "config.json")  # transformers' own error for broken json is long
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        causal = any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in config.architectures or ())
        loader = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        module: nn.Module = loader.from_pretrained(name, dtype=torch.float32)
        module.to(device)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(
            f"cannot load '{name}' with transformers ({reason}); give pygpt, a ckpt.pt, or a whole HuggingFace folder"
        ) from e
    encoder = tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None and not causal
    return LanguageModel(
        module=module,
        tokenizer=HFTokenizer(tokenizer),
        forward_fn=_hf_forward,
        name=name,
        d_model=config.hidden_size,
        max_len=min(int(getattr(config, "max_position_embeddings", 0) or 1 << 20), tokenizer.model_max_length),
        causal=not encoder,
        has_head=causal,
        wrap=(tokenizer.cls_token_id, tokenizer.sep_token_id) if encoder else None,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
    )
