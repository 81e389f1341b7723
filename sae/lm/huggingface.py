"""HuggingFace models: folders or ids that transformers can load, next-token models and encoders."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sae import files
from sae.config import UserError, read_json
from sae.lm.face import LanguageModel
from sae.lm.tokenizers import HFTokenizer


def _forward(module: nn.Module, ids: Tensor, valid: Tensor) -> Tensor | None:
    return getattr(module(input_ids=ids, attention_mask=valid.long()), "logits", None)


def _step(module: nn.Module, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    out = module(input_ids=ids, past_key_values=cache, use_cache=True)
    return out.logits, out.past_key_values


def _positions(module: nn.Module, config: Any) -> int:
    """The most tokens that its positions allow. RoBERTa's begin behind the one of its padding."""
    most = int(getattr(config, "max_position_embeddings", 0) or 1 << 20)
    tables = [m for name, m in module.named_modules() if "position" in name and isinstance(m, nn.Embedding)]
    padding = [m.padding_idx for m in tables if m.num_embeddings == most and m.padding_idx is not None]
    return most - max((at + 1 for at in padding), default=0)


def load(name: str, device: torch.device, dtype: str) -> LanguageModel:
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
    todo = "give pygpt, a ckpt.pt, or a whole HuggingFace folder"
    with files.one_sentence(f"cannot load '{name}' with transformers", todo):
        config = transformers.AutoConfig.from_pretrained(name)
        loader, causal = _loader(config)
        module: nn.Module = loader.from_pretrained(name, dtype=getattr(torch, dtype))
        module.to(device)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    encoder = tokenizer.cls_token_id is not None and tokenizer.sep_token_id is not None and not causal
    max_len = min(_positions(module, config), tokenizer.model_max_length)
    lm = LanguageModel(module, HFTokenizer(tokenizer), _forward, name, config.hidden_size, max_len, dtype=dtype)
    lm.has_head, lm.step_fn = causal, _step if causal else None
    lm.wrap = (tokenizer.cls_token_id, tokenizer.sep_token_id) if encoder else None
    lm.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return lm


def _loader(config: Any) -> tuple[Any, bool]:
    """The transformers class that loads a model, and whether it predicts next tokens."""
    import transformers

    causal = any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in config.architectures or ())
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModel, causal


def outline(name: str) -> LanguageModel | None:
    """The folder's model without weights or tokenizer, on the meta device; None if it is no folder of this family."""
    if importlib.util.find_spec("transformers") is None or not (Path(name) / "config.json").is_file():
        return None
    import transformers

    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(name)
        module = _loader(config)[0].from_config(config)
    return LanguageModel(module, None, lambda m, ids, _: m(ids), name, config.hidden_size, 1 << 20)
