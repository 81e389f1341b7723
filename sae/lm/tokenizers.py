r"""Tokenizers made elsewhere (HuggingFace, tiktoken, nanochat, nanoGPT's character tables) with tokenizer.py's surface.

The surface: vocab_size, bos_id, special_ids, encode, encode_document, decode, token_str, content_hash. A token shows as
exact text; bytes that are no UTF-8 by themselves appear as \xNN. Nothing in a file is executed. Knows no models.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from sae import log
from sae.config import UserError
from sae.files import one_sentence

MAX_PIECE = 900_000  # characters: tiktoken crashes on a run of a million spaces
Document = str | Sequence[dict[str, str]]


def plain_text(document: Document) -> str:
    """A text unchanged; a chat as lines `role: content`, for a tokenizer without chat tokens."""
    if isinstance(document, str):
        return document
    for message in document:
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"{message!r} is no chat message; wanted a role and content")
    return "".join(f"{message['role']}: {message['content']}\n" for message in document)


class TiktokenTokenizer:
    """A tiktoken Encoding. bos_id: the special token that begins a document."""

    def __init__(self, enc: Any, bos_id: int):
        self.enc, self.bos_id = enc, bos_id
        self.vocab_size: int = enc.n_vocab
        self.special_ids = frozenset(enc.encode_single_token(name) for name in enc.special_tokens_set)

    @classmethod
    def gpt2(cls) -> TiktokenTokenizer:
        """GPT-2's, which tiktoken downloads on first use."""
        import tiktoken

        try:
            enc = tiktoken.get_encoding("gpt2")
            return cls(enc, enc.eot_token)
        except OSError as e:  # requests' errors are OSErrors
            raise UserError("GPT-2's tokenizer needs a download; connect once, or give the model's own meta.pkl") from e

    def encode(self, text: str) -> list[int]:
        pieces = [text[i : i + MAX_PIECE] for i in range(0, len(text), MAX_PIECE)]
        return [i for piece in pieces for i in self._encode(piece)]

    def _encode(self, text: str) -> list[int]:
        return self.enc.encode_ordinary(text)

    def encode_document(self, document: Document) -> list[int]:
        return [self.bos_id, *self.encode(plain_text(document))]

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int] | None:  # noqa: ARG002
        """The ids of a chat that the model is to reply to; None if it has no chat format."""
        return None

    def decode(self, ids: Sequence[int]) -> str:
        return self.enc.decode(list(ids))

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token; of a special token those of its name."""
        try:
            return self.enc.decode_single_token_bytes(int(token_id))
        except (KeyError, OverflowError):  # a model's vocabulary may be padded
            return f"<{token_id}>".encode()

    def token_str(self, token_id: int) -> str:
        return self.token_bytes(token_id).decode("utf-8", "backslashreplace")

    def content_hash(self) -> str:
        digest = hashlib.sha256(str(getattr(self.enc, "_pat_str", "")).encode())
        for i in range(self.vocab_size):
            digest.update(f"\n{i} ".encode() + self.token_bytes(i))
        return digest.hexdigest()


class NanochatTokenizer(TiktokenTokenizer):
    """nanochat's tokenizer object: a tiktoken Encoding inside, and chats rendered as the model was trained on them."""

    def __init__(self, inner: Any):
        if not hasattr(inner, "enc"):
            raise UserError(
                f"this nanochat's {type(inner).__name__} has no tiktoken encoding, so its tokens cannot be shown; "
                "use the checkout that trained the model"
            )
        self.inner = inner
        super().__init__(inner.enc, inner.get_bos_token_id())

    def _encode(self, text: str) -> list[int]:
        return self.inner.encode(text)

    def encode_document(self, document: Document) -> list[int]:
        """A text after bos; a chat as nanochat's render_conversation writes it, never cut."""
        if isinstance(document, str):
            return [self.bos_id, *self.encode(document)]
        try:
            return self.inner.render_conversation({"messages": list(document)}, max_tokens=1 << 40)[0]
        except (AssertionError, LookupError, TypeError, ValueError) as e:
            raise ValueError(
                f"nanochat cannot render a chat ({e}); wanted turns of user and assistant, each with role and content"
            ) from e

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int] | None:
        return self.inner.render_for_completion({"messages": [*messages, {"role": "assistant", "content": ""}]})


class CharTokenizer:
    """One token per character, from nanoGPT's meta.pkl."""

    bos_id: int | None = None
    special_ids: frozenset[int] = frozenset()

    def __init__(self, chars: Sequence[str]):
        self.chars = list(chars)
        self.vocab_size = len(self.chars)
        self._ids = {char: i for i, char in enumerate(self.chars)}

    @classmethod
    def load(cls, path: str | Path) -> CharTokenizer:
        """Read a meta.pkl without executing anything in it. Raises UserError."""
        path = Path(path)
        with one_sentence(f"'{path}' is refused or unreadable", "wanted nanoGPT's plain meta.pkl"):
            meta = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
        itos = meta.get("itos") if isinstance(meta, dict) else None
        chars = [str(itos.get(i)) for i in range(len(itos))] if isinstance(itos, dict) else []
        if not chars or any(len(char) != 1 for char in chars) or len(set(chars)) < len(chars):
            raise UserError(f"'{path}' holds no table of characters (itos); give nanoGPT's meta.pkl")
        return cls(chars)

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[char] for char in text]
        except KeyError as e:
            raise ValueError(f"{e} is none of this model's {self.vocab_size} characters; leave it out") from e

    def encode_document(self, document: Document) -> list[int]:
        return self.encode(plain_text(document))

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int] | None:  # noqa: ARG002
        return None

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.token_str(i) for i in ids)

    def token_str(self, token_id: int) -> str:
        return self.chars[token_id] if 0 <= token_id < self.vocab_size else f"<{token_id}>"

    def content_hash(self) -> str:
        return hashlib.sha256(json.dumps(self.chars).encode()).hexdigest()


class _PlainUnpickler(pickle.Unpickler):
    """Refuses every class: numbers, strings and containers need none."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


class HFTokenizer:
    """A HuggingFace tokenizer with the surface of tokenizer.py. Threads may share it once it has encoded something."""

    def __init__(self, inner: Any):
        self.inner = inner
        added = getattr(inner, "added_tokens_decoder", {})  # chat tokens often are special without having a name
        self.special_ids = frozenset(inner.all_special_ids) | {i for i, token in added.items() if token.special}
        self.bos_id = inner.bos_token_id
        self.vocab_size = len(inner)

    @cached_property
    def _rust(self) -> Any:
        """The tokenizer below transformers', set to neither cut nor pad; None where it is Python."""
        rust = getattr(self.inner, "backend_tokenizer", None)
        if rust is None or not hasattr(rust, "encode_batch_fast"):
            return None
        rust.no_truncation()
        rust.no_padding()
        rust.encode_special_tokens = bool(getattr(self.inner, "split_special_tokens", False))
        return rust

    def encode(self, text: str) -> list[int]:
        if self._rust is None:
            return self.inner.encode(text, add_special_tokens=False, verbose=False)
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate, which json allows, is an error there
        # ids only: transformers' encode also computes offsets, masks and types
        return self._rust.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_document(self, document: Document) -> list[int]:
        """One bos before a text or chat, or one eos after it if the tokenizer has no bos, to separate documents.

        One that the chat's template or the text already has is not added again.
        """
        is_chat = not isinstance(document, str)
        ids = self.encode(self.render_chat(document) if is_chat else document)  # type: ignore[arg-type]
        bos, eos = self.bos_id, self.inner.eos_token_id
        if bos is not None:
            while bos == eos and ids[-1:] == [eos]:  # the next document begins with it
                ids.pop()
            return ids if ids[:1] == [bos] else [bos, *ids]
        return ids if eos is None or ids[-1:] == [eos] or (is_chat and eos in ids) else [*ids, eos]

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int] | None:
        """The ids of a chat that the model is to reply to, by its own template; None if it has none."""
        if not getattr(self.inner, "chat_template", None):
            return None
        return self.encode(self.render_chat(messages, reply=True))

    def render_chat(self, messages: Sequence[dict[str, str]], *, reply: bool = False) -> str:
        """A chat by the model's own template; without one, lines `role: content`. reply: the model is next."""
        if getattr(self.inner, "chat_template", None):
            from jinja2 import TemplateError

            attempts = [list(messages)]
            if [m["role"] for m in messages[:2]] == ["system", "user"]:  # some templates allow no system turn
                both = {"role": "user", "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
                attempts.append([both, *messages[2:]])
            for attempt in attempts:
                try:
                    # a fixed date: some templates write today's
                    return self.inner.apply_chat_template(
                        attempt, tokenize=False, add_generation_prompt=reply, date_string="26 Jul 2024"
                    )
                except (TemplateError, ValueError, TypeError, LookupError) as e:
                    reason = str(e)
            log.once(f"the model's chat template refuses some chats ({reason}); they are read as lines 'role: content'")
        return plain_text(messages)

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(list(ids))

    def token_str(self, token_id: int) -> str:
        r"""A token as exact text: incomplete characters show as \xNN, and a token that begins a word has its space."""
        token = self.inner.convert_ids_to_tokens(int(token_id))
        if token is None:
            return f"<{token_id}>"
        if token_id in self.special_ids:
            return token
        if self._byte_level:
            return bytes(self._bytes[c] for c in token).decode("utf-8", "backslashreplace")
        if len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)]).decode("utf-8", "backslashreplace")
        if self._inside:
            return token.removeprefix(self._inside) if token.startswith(self._inside) else f" {token}"
        return token.replace("\u2581", " ")

    @cached_property
    def _inside(self) -> str | None:
        """The prefix of pieces that do not begin a word, such as WordPiece's '##'."""
        return getattr(getattr(self._rust, "model", None), "continuing_subword_prefix", None)

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
