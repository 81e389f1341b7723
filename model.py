"""The GPT-2 architecture: forward, KV cache, generation, and the checkpoints of nanoGPT and HuggingFace.

Module and weight names are nanoGPT's, and everything worth hooking is a module of its own: the input of
`h[i]` is the residual stream before block i, the input of `h[i].ln_2` the stream between attention and MLP,
the output of `h[i]` the stream after the block, and `attn`, `mlp`, `mlp.gelu` return what their names say.
Knows nothing of text, data or training loops.

Letters: B sequences, T positions of this call, S positions in all, V vocabulary, C width, H heads.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a model. The first seven fields and their defaults are nanoGPT's."""

    block_size: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    gelu: str = "none"  # nanoGPT: the exact "none"; HuggingFace GPT-2: the approximation "tanh"

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r} is not a positive whole number; mend the settings")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is no multiple of n_head={self.n_head}; choose another")
        if not isinstance(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} is outside [0, 1); choose e.g. 0.1")
        if self.gelu not in ("none", "tanh"):
            raise ValueError(f"gelu={self.gelu!r} is unknown; choose 'none' (exact) or 'tanh' (approximate)")

    def model_args(self) -> dict[str, int | float | bool | str]:
        """Return what nanoGPT's own `GPTConfig(**model_args)` accepts, if it can express the model at all."""
        args = asdict(self)
        if self.gelu == "none":
            del args["gelu"]
        return args


class KVCache:
    """The keys and values of past positions, preallocated for a whole context of `batch_size` sequences."""

    def __init__(self, config: GPTConfig, batch_size: int, *, device=None, dtype=None) -> None:
        shape = (config.n_layer, batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0  # moved by GPT.forward at its end: a forward cut short leaves the cache as it was

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new k, v (B, H, T, C/H) behind the old ones; return those of all positions so far."""
        stop = self.length + k.shape[2]
        self.k[layer, :, :, self.length : stop] = k
        self.v[layer, :, :, self.length : stop] = v
        return self.k[layer, :, :, :stop], self.v[layer, :, :, :stop]


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__()
        self.n_head, self.layer = config.n_head, layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attn_dropout = nn.Dropout(config.dropout)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2))
        past = 0
        if cache is not None:
            past = cache.length
            k, v = cache.extend(self.layer, k, v)
        # is_causal aligns query 0 with key 0, which is wrong behind a cache: there the mask is written out,
        # and a single token needs none, since it may see everything.
        mask = None
        if past and T > 1:
            mask = torch.ones(T, past + T, dtype=torch.bool, device=x.device).tril(past)
        dropout = self.attn_dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=not past)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate=config.gelu)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int = 0) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: KVCache | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Holds what nanoGPT keeps under the name `transformer`; GPT.forward calls the parts."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)


class GPT(nn.Module):
    def __init__(self, config: GPTConfig, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        for name, p in self.named_parameters():
            # GPT-2: what writes into the residual stream starts smaller, since 2 * n_layer of them add up.
            std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02
            if p.ndim >= 2:
                nn.init.normal_(p, std=std, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    @property
    def device(self) -> torch.device:
        return self.lm_head.weight.device

    def new_cache(self, batch_size: int = 1) -> KVCache:
        return KVCache(self.config, batch_size, device=self.device, dtype=self.lm_head.weight.dtype)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the logits (B, T, V) of all positions, and with targets (B, T) their mean loss in nats.

        Targets of -1 do not count. With a cache, idx continues what the cache holds, which grows by T.
        """
        past = cache.length if cache is not None else 0
        S = past + idx.shape[1]
        if self.config.block_size < S:
            raise ValueError(f"{S} positions exceed block_size={self.config.block_size}; shorten the input")
        positions = torch.arange(past, S, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        for block in self.transformer.h:
            x = block(x, cache)
        logits = self.lm_head(self.transformer.ln_f(x))
        if cache is not None:
            cache.length = S
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        stop_ids: Collection[int] = (),
        use_cache: bool = True,
    ) -> Iterator[Tensor]:
        """Yield the continuation of idx (B, T) as (B, 1) tensors; temperature 0 takes the best token.

        A stop id is yielded, and repeated for its row until all rows have stopped. A full context loses its
        oldest half (also without the cache, so that both give the same tokens): no length is too long.
        """
        if idx.ndim != 2 or idx.shape[1] == 0:
            raise ValueError(f"the prompt has shape {tuple(idx.shape)}, wanted (B, T >= 1); give some token")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens={max_new_tokens}: wanted >= 0; mend it")
        if temperature < 0 or (top_k is not None and top_k < 1):
            raise ValueError(f"temperature={temperature}, top_k={top_k}: wanted >= 0 and >= 1; mend them")
        size = self.config.block_size
        window = idx[:, -size:]
        cache = self.new_cache(len(idx)) if use_cache else None
        stops = torch.tensor(sorted(stop_ids), device=idx.device)
        done = torch.zeros_like(idx[:, :1], dtype=torch.bool)
        token = idx[:, -1:]
        for _ in range(max_new_tokens):
            if window.shape[1] > size:
                window = window[:, -max(1, size // 2) :]
                if cache is not None:
                    cache.length = 0
            new = window if cache is None else window[:, cache.length :]
            logits = self(new, cache=cache)[0][:, -1].float()
            token = torch.where(done, token, sample_token(logits, temperature, top_k, generator))
            yield token
            if stop_ids:
                done |= torch.isin(token, stops)
                if bool(done.all()):
                    return
            window = torch.cat((window, token), dim=1)

    def configure_optimizer(
        self, *, learning_rate: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)
    ) -> torch.optim.AdamW:
        """AdamW that decays matrices and embeddings, not biases and norms; one fused kernel on CUDA."""
        params = list(self.parameters())
        groups = [
            {"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=self.device.type == "cuda")

    def to_checkpoint(self, *, dtype: torch.dtype = torch.float32, **state: Any) -> dict:
        """Return the dict that nanoGPT stores as ckpt.pt; state gives its optimizer, iter_num and so on."""
        weights = {name: w.to(dtype) for name, w in self.state_dict().items()}
        weights["lm_head.weight"] = weights["transformer.wte.weight"]  # one storage: the file holds it once
        fresh: dict[str, Any] = {"optimizer": None, "iter_num": 0, "best_val_loss": math.inf, "config": {}}
        return {"model": weights, "model_args": self.config.model_args(), **fresh, **state}

    @classmethod
    def from_checkpoint(cls, path: str | Path, device: str | torch.device = "cpu") -> GPT:
        """Read a nanoGPT checkpoint (a file, or a folder with a ckpt.pt) as a float32 model in eval mode."""
        return cls.from_checkpoint_dict(read_checkpoint(path), str(path)).to(device)

    @classmethod
    def from_checkpoint_dict(cls, checkpoint: Mapping, name: str = "checkpoint") -> GPT:
        """Build the model of an already read checkpoint; `name` is what errors call it."""
        args, known = checkpoint["model_args"], {field.name for field in fields(GPTConfig)}
        if not known - {"bias", "dropout", "gelu"} <= set(args) <= known:
            raise ValueError(f"{name}: model_args has {[*args]}, wanted nanoGPT's {sorted(known)}")
        return cls.from_weights(GPTConfig(**args), checkpoint["model"], name)

    @classmethod
    def from_weights(cls, config: GPTConfig, weights: Mapping[str, Tensor], name: str) -> GPT:
        """Build a float32 model in eval mode; every missing, unexpected or misshapen weight is an error."""
        with torch.device("meta"):  # nothing is allocated or drawn only to be overwritten
            model = cls(config)
        got = {}
        for key, w in weights.items():
            key = str(key).replace("_orig_mod.", "").replace("module.", "")  # added by torch.compile and DDP
            masks = (".attn.bias", ".attn.masked_bias")  # stored by old versions
            if isinstance(w, Tensor) and not key.endswith(masks):
                got[key] = w.float()
        have = {key: tuple(w.shape) for key, w in got.items()}
        want = {key: tuple(w.shape) for key, w in model.state_dict().items()}
        wrong = [key for key in sorted({*have, *want}) if have.get(key) != want.get(key)]
        if wrong:
            first = [f"{key} is {have.get(key)}, wanted {want.get(key)}" for key in wrong[:3]]
            raise ValueError(f"{name}: {len(wrong)} weights do not fit model_args: {'; '.join(first)}")
        if not torch.equal(got["lm_head.weight"], got["transformer.wte.weight"]):
            raise ValueError(f"{name}: lm_head and wte differ, but this model ties them; give a tied model")
        model.load_state_dict(got, assign=True)
        model.transformer.wte.weight = model.lm_head.weight
        return model.requires_grad_(True).eval()

    @classmethod
    def from_hf(cls, folder_or_id: str | Path, device: str | torch.device = "cpu") -> GPT:
        """Read a HuggingFace GPT-2 (a folder or a hub id) into a float32 model in eval mode."""
        try:
            from safetensors import SafetensorError
            from transformers import AutoConfig, GPT2LMHeadModel
        except ImportError as e:
            raise ValueError("a HuggingFace model needs transformers: pip install 'nanosae[hf]'") from e
        name = str(folder_or_id)
        try:
            config = config_from_hf(AutoConfig.from_pretrained(name), name)
            hf, report = cast(Any, GPT2LMHeadModel).from_pretrained(name, output_loading_info=True)
        except OSError as e:
            reason = str(e).splitlines()[0]
            raise FileNotFoundError(f"{name}: no HuggingFace model, {reason}; give a folder or id") from e
        except (RuntimeError, SafetensorError) as e:
            raise ValueError(f"{name}: its weights are broken or misshapen; copy them again") from e
        if report["missing_keys"]:  # transformers leaves them random
            raise ValueError(f"{name}: lacks weights {sorted(report['missing_keys'])}; give a whole model")
        weights = hf.state_dict()
        for key in weights:
            if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):  # Conv1D: a transposed Linear
                weights[key] = weights[key].t().contiguous()
        return cls.from_weights(config, weights, name).to(device)


def sample_token(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    """Draw one token (B, 1) from the logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)


def config_from_hf(hf, name: str) -> GPTConfig:
    """Translate a transformers config; what this model cannot express is an error that names it."""
    gelu = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
    expressible: dict[str, Collection] = {
        "model_type": ["gpt2"],  # first: other types lack the other keys
        "n_inner": [None, 4 * getattr(hf, "n_embd", 0)],
        "activation_function": list(gelu),
        "layer_norm_epsilon": [1e-5],
        "scale_attn_weights": [True],
        "scale_attn_by_inverse_layer_idx": [False],
        "add_cross_attention": [False],
        "tie_word_embeddings": [True],
    }
    for key, values in expressible.items():
        if getattr(hf, key) not in values:
            raise ValueError(f"{name}: {key}={getattr(hf, key)!r} cannot be expressed, wanted any of {values}")
    approximation = gelu[hf.activation_function]
    return GPTConfig(hf.n_positions, hf.vocab_size, hf.n_layer, hf.n_head, hf.n_embd, gelu=approximation)


def read_checkpoint(path: str | Path) -> dict:
    """Load a nanoGPT checkpoint's dict onto the CPU, never running code that the file may carry."""
    path = Path(path)
    path = path / "ckpt.pt" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; give a ckpt.pt or a folder that has one")
    with path.open("rb") as file:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as e:  # a broken file can raise anything
            if "unsupported global" in str(e).lower():
                raise ValueError(f"{path}: refused, it wants to run code; save plain tensors instead") from e
            raise ValueError(f"{path}: truncated or not a PyTorch checkpoint; copy or save it again") from e
    found = checkpoint if isinstance(checkpoint, dict) else {}
    if not all(isinstance(found.get(key), dict) for key in ("model", "model_args")):
        raise ValueError(f"{path}: holds {sorted(map(str, found))[:8]}, wanted nanoGPT's model, model_args")
    return found


def save_atomic(checkpoint: dict, path: str | Path) -> None:
    """Write a checkpoint so that the file under `path` is whole at every moment, even across a crash."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with tmp.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)
