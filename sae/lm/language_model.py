"""One small interface over pygpt, nanoGPT, nanochat and HuggingFace models: tokens in, hidden states and logits out.

Those models are imported here (nanochat in nanochat.py), and only when asked for. Knows nothing of SAEs; the hooks
place themselves on `LanguageModel.module`.

Letters: N sequences, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sae import files, hooks
from sae.config import ModelDtype, UserError, read_json, require
from sae.files import beside
from sae.lm import nanochat
from sae.lm.tokenizers import CharTokenizer, HFTokenizer, NanochatTokenizer, TiktokenTokenizer

PYGPT = files.ROOT / "assets" / "pygpt"
# Where families keep the norm before the unembedding; the first that exists is taken.
FINAL_NORMS = (
    "transformer.ln_f", "model.norm", "gpt_neox.final_layer_norm", "model.decoder.final_layer_norm",
    "model.final_layernorm",
)  # fmt: skip


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
    step_fn:    (module, ids (N, T), cache or None) -> logits (N, T, V) and the cache with these tokens; a shortcut only
    dtype:      what it computes in
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
    step_fn: Callable[[nn.Module, Tensor, Any], tuple[Tensor, Any]] | None = None
    dtype: str = "float32"

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
        """What the hookpoints hold, (N, T, D) each; the forward stops after the last of them.

        An encoder's rows are often short, a piece of one document each: they run with others of about their length, and
        what lies behind them is 0.
        """
        if self.wrap is None:
            return self._hidden(ids, valid, hookpoints)
        found: dict[str, Tensor] = {}
        for rows, width in _by_length(valid):
            for name, x in self._hidden(ids[rows, :width], valid[rows, :width], hookpoints).items():
                if x.shape[:2] != (len(rows), width):  # nothing that tokens have
                    return self._hidden(ids, valid, hookpoints)
                found.setdefault(name, x.new_zeros(*ids.shape, *x.shape[2:]))[rows, :width] = x
        return found

    def _hidden(self, ids: Tensor, valid: Tensor, hookpoints: Sequence[str]) -> dict[str, Tensor]:
        ids, valid = ids.to(self.device), valid.to(self.device)
        seen = hooks.run(self.module, hookpoints, lambda: self.forward_fn(self.module, ids, valid))
        # forward_fn may have run on more positions, to the right
        return {name: x[:, : ids.shape[1]] if x.ndim == 3 else x for name, x in seen.items()}

    @torch.no_grad()
    def logits_replacing(self, ids: Tensor, valid: Tensor, hookpoint: str, x: Tensor) -> Tensor | None:
        """Logits of a forward in which the hookpoint holds x (N, T, D) instead of what it would."""
        logits = self.resume_fn(self.module, hookpoint, x) if self.resume_fn is not None else None
        if logits is None:
            # forward_fn may run on more positions, to the right
            whole = lambda old: x if x.shape == old.shape else torch.cat((x, old[:, x.shape[1] :]), 1)
            with hooks.replace(self.module, {hookpoint: whole}):
                logits = self.logits(ids, valid)
        return logits

    @torch.no_grad()
    def generate(
        self, ids: Tensor, max_new_tokens: int,
        *, temperature: float = 1.0, top_k: int | None = None, generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Yield what follows ids (N, T), token by token as (N, 1); temperature 0 takes the best, top_k draws from the
        best so many. A full context loses its oldest half."""
        require(self.has_head, f"'{self.name}' has no next-token head, so it writes nothing; give another model")
        window, cache, n_read = ids.to(self.device)[:, -self.max_len :], None, 0
        for _ in range(max_new_tokens):
            if window.shape[1] > self.max_len:
                window, cache, n_read = window[:, -max(1, self.max_len // 2) :], None, 0
            if self.step_fn is not None:
                logits, cache = self.step_fn(self.module, window[:, n_read:], cache)
            else:
                found = self.forward_fn(self.module, window, torch.ones_like(window, dtype=torch.bool))
                assert found is not None
                logits = found
            n_read = window.shape[1]
            last = logits[:, -1, : self.tokenizer.vocab_size].float()  # a model's vocabulary may be padded
            if top_k is not None and top_k < last.shape[1]:
                last = last.masked_fill(last < last.topk(top_k).values[:, -1:], -torch.inf)
            if temperature == 0:
                token = last.argmax(-1, keepdim=True)
            else:
                token = torch.multinomial((last / temperature).softmax(-1), 1, generator=generator)
            yield token
            window = torch.cat((window, token), 1)

    def widths(self, hookpoints: Sequence[str]) -> dict[str, int]:
        """Width of what each hookpoint holds, from two tiny forwards."""
        ids = torch.full((1, 2), max(0, self.pad_id), dtype=torch.int64)
        valid = torch.ones_like(ids, dtype=torch.bool)
        found = self.hidden(ids, valid, hookpoints)
        at = ids.to(self.device), valid.to(self.device)
        with torch.no_grad():
            hooks.check_once(self.module, hookpoints, lambda: self.forward_fn(self.module, *at))
        for name, x in found.items():
            if x.ndim != 3 or x.shape[:2] != ids.shape or not x.is_floating_point():
                raise UserError(
                    f"'{name}' holds {x.dtype} of shape {tuple(x.shape)}, not one vector a token; choose another"
                )
        return {name: found[name].shape[-1] for name in hookpoints}

    @cached_property
    def final_norm(self) -> str | None:
        """Path of the norm before the unembedding; None where it is no module."""
        names = dict(self.module.named_modules())
        return next((n for n in FINAL_NORMS if n in names), None)

    @property
    def _final_norm(self) -> nn.Module | None:
        return self.module.get_submodule(self.final_norm) if self.final_norm else None

    @cached_property
    def unembedding(self) -> Tensor | None:
        """(V, D): the map from the last residual stream to logits, with the final norm's gain folded in; or None."""
        head = getattr(self.module, "lm_head", None) or getattr(self.module, "embed_out", None)
        weight = getattr(head, "weight", None)
        if weight is None or weight.shape[1] != self.d_model:
            return None
        gain = getattr(self._final_norm, "weight", None)
        # nanochat pads the matrix and cuts the logits to the vocabulary
        weight = weight.detach()[: getattr(getattr(self.module, "config", None), "vocab_size", None)].float()
        if gain is None:
            return weight
        # Gemma's norms store their gain as a difference from 1
        shift = 1.0 if "Gemma" in type(self._final_norm).__name__ else 0.0
        return weight * (gain.detach().float() + shift)

    @torch.no_grad()
    def logit_effects(self, directions: Tensor) -> Tensor | None:
        """(n, V): how directions (n, D) added to the last residual stream move the logits, up to the norm's scale.

        Through the final norm's gain; a LayerNorm also removes the mean over D, an RMSNorm does not. A soft cap behind
        the logits is left out: it shrinks an effect and keeps its sign.
        """
        # nanochat's final norm is a function, an RMSNorm without gain: no module is found, and neither gain nor mean is
        # applied, which is right. Its lambdas (of the stream, and of the middle layer's output that the end subtracts)
        # scale a direction on its straight way to the end and do not turn it.
        if self.unembedding is None or directions.shape[-1] != self.d_model:
            return None
        directions = directions.float()
        if self._final_norm is not None and "RMS" not in type(self._final_norm).__name__:
            directions = directions - directions.mean(-1, keepdim=True)
        return directions @ self.unembedding.to(directions.device).t()

    def norm_scale(self, x: Tensor) -> Tensor:
        """() what the final norm divides x (D,), the last residual stream of a token, by."""
        norm = self._final_norm
        eps = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", None) or 0.0
        centred = x.float() if "RMS" in type(norm).__name__ else x.float() - x.float().mean()
        return (centred.square().mean() + eps).sqrt()

    @cached_property
    def weights_hash(self) -> str:
        """sha256 of all weights by name, for provenance: equal for equal models whatever the device."""
        digest = hashlib.sha256()
        for name, w in sorted(self.module.state_dict().items()):
            if w.dtype in (torch.bfloat16, torch.float16):  # nanochat keeps some so on a GPU, and not on a CPU
                w = w.float()
            digest.update(f"{name} {tuple(w.shape)} {w.dtype}".encode())
            digest.update(w.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def load_language_model(
    name: str = "pygpt", *, device: str | torch.device | None = None, dataset: str | None = None,
    dtype: str = "float32",
) -> LanguageModel:  # fmt: skip
    """The model `name` means.

    pygpt; a nanoGPT ckpt.pt (or its folder); nanochat:base, nanochat:sft/d20, nanochat:rl/d20@000500, or a folder of
    nanochat's checkpoints (or one model_000500.pt); or a HuggingFace folder or id. A nanoGPT checkpoint is built by the
    model.py beside sae/, a nanochat one by the nanochat that Python finds.

    dataset: a nanoGPT data folder, where a checkpoint's character table (meta.pkl) may lie. dtype: of its weights, and
    so of its products and activations (float32, bfloat16, float16; of nanochat's, float32 is what nanochat chooses).
    Raises UserError for a missing, truncated, foreign or hostile file; nothing in it is ever executed.
    """
    where, known = best_device(str(device) if device is not None else None), get_args(ModelDtype)
    require(dtype in known, f"dtype={dtype!r}; a model computes in {', '.join(known)}")
    if name.startswith("nanochat:"):
        return _nanochat(name, None, where, dtype)
    path = PYGPT if name == "pygpt" else Path(name)
    if path.is_dir() and (path / "ckpt.pt").is_file():
        return _nanogpt(path / "ckpt.pt", name, where, dataset, dtype)
    found = nanochat.newest_checkpoint(path)
    if found is not None:
        return _nanochat(name, found, where, dtype)
    if path.is_file():
        return _nanogpt(path, name, where, dataset, dtype)
    if path.suffix in (".pt", ".pth", ".bin") or (path.parent != Path() and not path.exists() and name[0] in "./~"):
        raise UserError(f"model '{name}' does not exist; give a ckpt.pt, a HuggingFace folder or id, or pygpt")
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"folder '{name}' holds neither a ckpt.pt nor a HuggingFace config.json nor nanochat's model_*.pt; "
            "give another model"
        )
    return _huggingface(name, where, dtype)


def _by_length(valid: Tensor) -> list[tuple[Tensor, int]]:
    """Rows (n,) of valid (N, T) whose last real position lies below the same power of two, or T; and that bound."""
    T = valid.shape[1]
    lengths = (valid * torch.arange(1, T + 1, device=valid.device)).amax(1).tolist()
    bounds = torch.tensor([min(T, 1 << max(3, (n - 1).bit_length())) for n in lengths], dtype=torch.int64)
    return [((bounds == bound).nonzero()[:, 0], bound) for bound in bounds.unique().tolist()]


def read_plain(path: Path, **options: Any) -> Any:
    """What a .pt file holds, on the CPU; one that wants code to run is refused."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, **options)
    except Exception as e:  # a broken file can raise anything
        if "unsupported global" in str(e).lower():
            raise UserError(f"'{path}' is refused: it wants to run code; save plain tensors instead") from e
        raise UserError(f"'{path}' is truncated or no PyTorch checkpoint; copy or save it again") from e


# --------------------------------------------------------------------------------------------------
# nanoGPT: ours, or anyone's whose model.py lies beside sae/


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


def _nanogpt_step(module: nn.Module, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    cache = module.new_cache(len(ids)) if cache is None else cache  # type: ignore[operator]
    return module(ids, cache=cache)[0], cache


def _nanogpt(path: Path, name: str, device: torch.device, dataset: str | None, dtype: str) -> LanguageModel:
    checkpoint = read_plain(path)
    found = checkpoint if isinstance(checkpoint, dict) else {}
    if not all(isinstance(found.get(key), dict) for key in ("model", "model_args")):
        raise UserError(f"'{path}' holds {sorted(map(str, found))[:8]}, wanted nanoGPT's model and model_args")
    model_py = beside("model.py")
    ours = hasattr(getattr(model_py, "GPT", None), "from_checkpoint_dict")
    try:
        module = model_py.GPT.from_checkpoint_dict(found, str(path)) if ours else _foreign_gpt(model_py, found, path)
    except (ValueError, OSError) as e:
        raise UserError(str(e)) from e
    config = module.config
    tokenizer = _nanogpt_tokenizer(path, found, dataset)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer knows {tokenizer.vocab_size} tokens and '{path}' only {config.vocab_size}; "
            "put the checkpoint's own tokenizer.json or meta.pkl beside it"
        )
    return LanguageModel(
        module=module.to(device, getattr(torch, dtype)), tokenizer=tokenizer, forward_fn=_nanogpt_forward, name=name,
        dtype=dtype, d_model=config.n_embd, max_len=config.block_size,
        resume_fn=_nanogpt_resume if ours else None,  # another forward may do more between its blocks
        step_fn=_nanogpt_step if ours else None,
    )  # fmt: skip


def _foreign_gpt(model_py: ModuleType, checkpoint: dict, path: Path) -> Any:
    """The checkpoint's model, by the GPT and GPTConfig of somebody's own model.py; every weight must fit."""
    weights = {str(key).removeprefix("_orig_mod."): w for key, w in checkpoint["model"].items()}  # torch.compile's
    try:
        with torch.random.fork_rng(devices=[]), redirect_stdout(sys.stderr):  # it draws weights and tells their number
            module = model_py.GPT(model_py.GPTConfig(**checkpoint["model_args"]))
        wrong = module.load_state_dict(weights, strict=False)
    except Exception as e:
        reason = str(e).strip().splitlines()
        raise UserError(
            f"the model.py beside sae cannot build '{path}' ({' '.join(reason[:2]) or type(e).__name__}); "
            "use the model.py that trained it"
        ) from e
    # whether attention keeps its mask as a buffer depends on the torch that trained it
    odd = [key for key in (*wrong.missing_keys, *wrong.unexpected_keys) if not key.endswith(".attn.bias")]
    if odd:
        raise UserError(
            f"'{path}' does not fit the model.py beside sae: it lacks or adds {', '.join(odd[:4])}; "
            "use the model.py that trained it"
        )
    return module


def _nanogpt_tokenizer(path: Path, checkpoint: dict, dataset: str | None) -> Any:
    """The tokenizer beside the checkpoint, in the dataset's folder, or GPT-2's."""
    config = checkpoint.get("config")
    trained_on = str(config.get("dataset", "")) if isinstance(config, dict) else ""
    folders = [path.parent, *([Path(dataset)] if dataset else [])]
    if trained_on:
        folders += [root / "data" / trained_on for root in (Path(), path.parent.parent, files.ROOT)]
    file = files.ROOT / "tokenizer.py"
    ours = beside("tokenizer.py") if file.is_file() and b"def load_tokenizer(" in file.read_bytes() else None
    try:
        for folder in folders:
            if ours is not None and (folder / "tokenizer.json").is_file():
                return ours.load_tokenizer(folder)
            if (folder / "meta.pkl").is_file():
                return ours.load_tokenizer(folder) if ours is not None else CharTokenizer.load(folder / "meta.pkl")
        if checkpoint["model_args"].get("vocab_size") in (50257, 50304):
            return ours.BPETokenizer.gpt2() if ours is not None else TiktokenTokenizer.gpt2()
    except (ValueError, OSError) as e:
        raise UserError(str(e)) from e
    raise UserError(
        f"no tokenizer for '{path}'; put its {'tokenizer.json or ' if ours is not None else ''}meta.pkl beside it, "
        "or give the nanoGPT data folder as --dataset"
    )


# --------------------------------------------------------------------------------------------------
# nanochat (nanochat.py)


def _nanochat_forward(module: nn.Module, ids: Tensor, valid: Tensor) -> Tensor:
    del valid  # causal, padded on the right: padding cannot be seen
    # without a cache its forward refuses a single position
    return module(ids) if ids.shape[1] > 1 else module(F.pad(ids, (0, 1)))[:, :1]


def _nanochat(name: str, file: Path | None, device: torch.device, dtype: str) -> LanguageModel:
    if file is not None:
        read_plain(file, mmap=True)  # before nanochat's own loader, which under old versions of torch runs pickles
    built = nanochat.build(name, file, device, dtype)
    # No resume_fn: between its blocks nanochat mixes the stream with the embeddings, and it subtracts the middle
    # layer's output at the end, so what follows a block depends on more than that block's output.
    return LanguageModel(
        module=built.module, dtype=built.dtype, name=built.name, tokenizer=NanochatTokenizer(built.tokenizer),
        forward_fn=_nanochat_forward, d_model=built.module.config.n_embd, max_len=built.module.config.sequence_len,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# HuggingFace


def _hf_forward(module: nn.Module, ids: Tensor, valid: Tensor) -> Tensor | None:
    return getattr(module(input_ids=ids, attention_mask=valid.long()), "logits", None)


def _hf_step(module: nn.Module, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    out = module(input_ids=ids, past_key_values=cache, use_cache=True)
    return out.logits, out.past_key_values


def _positions(module: nn.Module, config: Any) -> int:
    """The most tokens that its positions allow. RoBERTa's begin behind the one of its padding."""
    most = int(getattr(config, "max_position_embeddings", 0) or 1 << 20)
    tables = [m for name, m in module.named_modules() if "position" in name and isinstance(m, nn.Embedding)]
    padding = [m.padding_idx for m in tables if m.num_embeddings == most and m.padding_idx is not None]
    return most - max((at + 1 for at in padding), default=0)


def _huggingface(name: str, device: torch.device, dtype: str) -> LanguageModel:
    try:
        import transformers
    except ImportError as e:
        raise UserError(f"'{name}' needs transformers; run: pip install 'nanosae[hf]'") from e
    if name.count("/") > 1 and not Path(name).exists():  # no hub id has two
        raise UserError(f"model folder '{name}' does not exist; give a HuggingFace folder or id, pygpt or a ckpt.pt")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if (Path(name) / "config.json").is_file():
        read_json(Path(name) / "config.json")  # transformers' own error for broken json is long
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        causal = any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in config.architectures or ())
        loader = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        module: nn.Module = loader.from_pretrained(name, dtype=getattr(torch, dtype))
        module.to(device)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as e:
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(
            f"cannot load '{name}' with transformers ({reason}); give pygpt, a ckpt.pt, or a whole HuggingFace folder"
        ) from e
    encoder = tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None and not causal
    return LanguageModel(
        module=module, tokenizer=HFTokenizer(tokenizer), forward_fn=_hf_forward, name=name, dtype=dtype,
        d_model=config.hidden_size,
        max_len=min(_positions(module, config), tokenizer.model_max_length),
        causal=not encoder, has_head=causal,
        wrap=(tokenizer.cls_token_id, tokenizer.sep_token_id) if encoder else None,
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        step_fn=_hf_step if causal else None,
    )  # fmt: skip
