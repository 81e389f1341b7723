"""Text <-> token ids: byte-level BPE (run by tiktoken, trained here) and nanoGPT's character tables.

Both kinds share one surface: vocab_size, bos_id, special_ids, encode, encode_document, render_chat, decode,
token_bytes, token_str, content_hash. Ordinary text never becomes a special token. Knows no models or data.
"""

from __future__ import annotations

import base64
import hashlib
import heapq
import io
import json
import os
import pickle
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

# nanochat's names
CHAT_TOKENS = ("<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")
MAX_PIECE = 900_000  # characters: tiktoken's matcher dies of a run of a million spaces

# Made for Python source, where layout is meaning:
PATTERN = "|".join(
    (
        r"(?:\r?\n)+[ \t]*",  # line ends with the next line's whole indentation: the block depth is one token
        r" ?__\p{L}+__",  # __init__ and friends
        r"[ _.]?\p{L}+",  # words; snake_case splits before each _, attributes keep their dot
        r"\p{N}{1,3}",  # long numbers in pieces of at most three digits
        r" ?[^\s\p{L}\p{N}]+",  # runs of punctuation, as in `):` or ` ==`
        r"[^\S\r\n]+(?!\S)",  # inner spaces, but the last of them goes with the word behind it
        r"\s",
    )
)


class Tokenizer:
    """What both kinds share. A kind gives encode, token_bytes, vocab_size and the ids of its specials."""

    vocab_size: int
    specials: Mapping[str, int] = {}

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def token_bytes(self, id: int) -> bytes:
        raise NotImplementedError

    @property
    def bos_id(self) -> int | None:
        return self.specials.get("<|bos|>", self.specials.get("<|endoftext|>"))

    @property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self.specials.values())

    def encode_document(self, doc: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Encode one training document: a text behind a bos (if there is one), or a chat by render_chat."""
        return self._bos() + self.encode(doc) if isinstance(doc, str) else self.render_chat(doc)

    def render_chat(self, messages: Sequence[Mapping[str, str]], *, reply: bool = False) -> list[int]:
        """Encode a chat; reply=True leaves the assistant's turn open. No chat tokens: lines `role: text`.

        A system message goes before what the user says first, as in nanochat.
        """
        for message in messages:
            role, content = message.get("role"), message.get("content")
            if role not in ("user", "assistant", "system") or not isinstance(content, str):
                raise ValueError(f"{message!r} is no chat message; wanted content and a role: user, assistant, system")
        turns = [("user" if m["role"] == "system" else m["role"], m["content"]) for m in messages]
        if [m["role"] for m in messages[:2]] == ["system", "user"]:
            turns[:2] = [("user", "\n\n".join(content for _, content in turns[:2]))]
        if reply and (not turns or turns[-1][0] != "assistant"):
            turns.append(("assistant", ""))
        if not self.specials.keys() >= set(CHAT_TOKENS):
            text = "\n".join(f"{role}: {content}".rstrip(" ") for role, content in turns)
            return self._bos() + self.encode(text if reply else text + "\n")
        ids = self._bos()
        for role, content in turns:
            ids.append(self.specials[f"<|{role}_start|>"])
            ids += self.encode(content)
            ids.append(self.specials[f"<|{role}_end|>"])
        return ids[:-1] if reply else ids

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int] | None:
        """Encode a chat that the model is to reply to; None without chat tokens."""
        return self.render_chat(messages, reply=True) if self.specials.keys() >= set(CHAT_TOKENS) else None

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(self.token_bytes(int(i)) for i in ids).decode("utf-8", errors="replace")

    def token_str(self, id: int) -> str:
        r"""Return a token for display: bytes that are no UTF-8 by themselves appear as \xNN."""
        return self.token_bytes(id).decode("utf-8", errors="backslashreplace")

    def _bos(self) -> list[int]:
        return [] if self.bos_id is None else [self.bos_id]

    def _check(self, id: int) -> None:
        if not 0 <= id < self.vocab_size:
            raise ValueError(f"token {id} is outside 0..{self.vocab_size - 1}; is it the right tokenizer?")


class BPETokenizer(Tokenizer):
    """Byte-level BPE. ranks: the tokens' bytes in order of their ids; the specials follow."""

    def __init__(self, pattern: str, ranks: Sequence[bytes], special_tokens: Sequence[str]) -> None:
        if not {bytes([b]) for b in range(256)} <= set(ranks) or len(set(ranks)) != len(ranks):
            raise ValueError("the BPE ranks must be distinct and hold all 256 bytes; is the file whole?")
        if len(set(special_tokens)) != len(special_tokens):
            raise ValueError(f"special_tokens={list(special_tokens)} has duplicates; name each once")
        self.pattern, self.ranks = pattern, list(ranks)
        self.specials: dict[str, int] = {name: len(ranks) + i for i, name in enumerate(special_tokens)}
        self.vocab_size = len(ranks) + len(self.specials)
        self._bytes = self.ranks + [name.encode() for name in self.specials]

    @cached_property
    def _tiktoken(self):
        # Imported on first use: byte counts and decoding do without it.
        import tiktoken

        ranks = {token: i for i, token in enumerate(self.ranks)}
        return tiktoken.Encoding(
            name="nanosae", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=self.specials
        )

    def encode(self, text: str) -> list[int]:
        pieces = [text[i : i + MAX_PIECE] for i in range(0, len(text), MAX_PIECE)]
        return [id for piece in pieces for id in self._tiktoken.encode_ordinary(piece)]

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes that a token stands for; a special token's are its name."""
        self._check(id)
        return self._bytes[id]

    def _as_json(self) -> str:
        ranks = [base64.b64encode(token).decode() for token in self.ranks]
        data = {"pattern": self.pattern, "special_tokens": list(self.specials), "ranks": ranks}
        return json.dumps(data, indent=0)

    def content_hash(self) -> str:
        return hashlib.sha256(self._as_json().encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tmp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        with tmp.open("w", encoding="utf-8", newline="\n") as file:
            file.write(self._as_json() + "\n")
            file.flush()
            os.fsync(file.fileno())
        tmp.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> BPETokenizer:
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            ranks = [base64.b64decode(token, validate=True) for token in data["ranks"]]
            pattern, specials = data["pattern"], data["special_tokens"]
            if type(specials) is not list or not all(isinstance(text, str) for text in (pattern, *specials)):
                raise TypeError("pattern is no text, or special_tokens no list of texts")
            return cls(pattern, ranks, specials)
        except (ValueError, LookupError, TypeError, RecursionError) as e:
            raise ValueError(f"{path}: no tokenizer.json of ours ({e}); copy it or train it again") from e

    @classmethod
    def gpt2(cls) -> BPETokenizer:
        """GPT-2's tokenizer, which tiktoken downloads on first use."""
        from tiktoken_ext.openai_public import gpt2

        try:
            spec = gpt2()
        except OSError as e:  # requests' errors are OSErrors
            raise ConnectionError("GPT-2's tokenizer needs a download; connect once, or give your own") from e
        ranks = sorted(spec["mergeable_ranks"], key=spec["mergeable_ranks"].__getitem__)
        return cls(spec["pat_str"], ranks, list(spec["special_tokens"]))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = CHAT_TOKENS) -> BPETokenizer:
        """Learn a vocabulary of vocab_size tokens, specials included (fewer if texts run out of pairs)."""
        import regex  # tiktoken depends on it; `re` does not know \p{L}

        n_merges = vocab_size - 256 - len(special_tokens)
        if n_merges < 0:
            least = 256 + len(special_tokens)
            raise ValueError(f"vocab_size={vocab_size} is below {least}, the bytes and specials; raise it")
        split = regex.compile(PATTERN)
        words: Counter[str] = Counter()
        for text in texts:
            words.update(split.findall(text))
        return cls(PATTERN, _learn_merges(words, n_merges), special_tokens)


def _learn_merges(words: Mapping[str, int], n_merges: int) -> list[bytes]:
    """Merge the most frequent pair again and again; ties go to the pair with the lower ids, so runs agree."""
    tokens = [bytes([b]) for b in range(256)]
    ids = {token: i for i, token in enumerate(tokens)}
    spelled = [list(word.encode("utf-8", errors="replace")) for word in words]
    counts = list(words.values())
    pair_count: Counter[tuple[int, int]] = Counter()
    words_with: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for w, word in enumerate(spelled):
        for pair in zip(word, word[1:]):  # noqa: B905 - pairs of neighbours
            pair_count[pair] += counts[w]
            words_with[pair].add(w)
    heap = [(-count, pair) for pair, count in pair_count.items()]
    heapq.heapify(heap)
    while heap and len(tokens) < 256 + n_merges:
        negative, pair = heapq.heappop(heap)
        count = pair_count.get(pair, 0)
        if count <= 0:
            continue
        if -negative != count:  # an old entry: the pair lost or gained words since
            heapq.heappush(heap, (-count, pair))
            continue
        token = tokens[pair[0]] + tokens[pair[1]]
        if token not in ids:  # tiktoken knows tokens by their bytes: two ways to spell one are one token
            ids[token] = len(tokens)
            tokens.append(token)
        changed: Counter[tuple[int, int]] = Counter()
        for w in words_with.pop(pair):
            old = spelled[w]
            spelled[w] = new = _merge(old, pair, ids[token])
            for p in zip(old, old[1:]):  # noqa: B905
                changed[p] -= counts[w]
            for p in zip(new, new[1:]):  # noqa: B905
                changed[p] += counts[w]
                words_with[p].add(w)
        for p, change in changed.items():
            if change:
                pair_count[p] += change
                heapq.heappush(heap, (-pair_count[p], p))
    return tokens


def _merge(word: list[int], pair: tuple[int, int], token: int) -> list[int]:
    merged, i = [], 0
    while i < len(word):
        if word[i] == pair[0] and i + 1 < len(word) and word[i + 1] == pair[1]:
            merged.append(token)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


class CharTokenizer(Tokenizer):
    """One token per character, from nanoGPT's meta.pkl."""

    def __init__(self, chars: Sequence[str]) -> None:
        self.chars = list(chars)
        self.vocab_size = len(self.chars)
        self._ids = {char: i for i, char in enumerate(self.chars)}

    def encode(self, text: str) -> list[int]:
        try:
            return [self._ids[char] for char in text]
        except KeyError as e:
            raise ValueError(f"{e} is none of this model's {self.vocab_size} characters; leave it out") from e

    def token_bytes(self, id: int) -> bytes:
        self._check(id)
        return self.chars[id].encode("utf-8", errors="replace")

    def content_hash(self) -> str:
        return hashlib.sha256(json.dumps(self.chars).encode()).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> CharTokenizer:
        """Read a meta.pkl without ever running what a pickle may ask for."""
        path = Path(path)
        if path.stat().st_size > 64 * 2**20:
            raise ValueError(f"{path}: {path.stat().st_size} bytes, but a meta.pkl is small; give nanoGPT's")
        content = path.read_bytes()
        try:
            meta = _PlainUnpickler(io.BytesIO(content)).load()
        except Exception as e:  # a broken pickle can raise anything
            raise ValueError(f"{path}: refused or unreadable ({e}); wanted nanoGPT's plain meta.pkl") from e
        meta = meta if isinstance(meta, dict) else {}
        itos, stoi, size = (meta.get(key) for key in ("itos", "stoi", "vocab_size"))
        if not (isinstance(itos, dict) and isinstance(stoi, dict) and 0 < len(itos) == size):
            raise ValueError(f"{path}: wanted stoi, itos and vocab_size that agree; give nanoGPT's meta.pkl")
        chars = [str(itos.get(i)) for i in range(len(itos))]
        if not all(len(char) == 1 and stoi.get(char) == i for i, char in enumerate(chars)):
            raise ValueError(f"{path}: itos and stoi are no inverse tables of characters; give nanoGPT's")
        return cls(chars)


class _PlainUnpickler(pickle.Unpickler):
    """Numbers, texts and containers need no class: so every class is refused."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_tokenizer(path: str | Path) -> BPETokenizer | CharTokenizer:
    """Load a tokenizer.json or a meta.pkl, or the one that a folder contains."""
    path = Path(path)
    candidates = [path / "tokenizer.json", path / "meta.pkl"] if path.is_dir() else [path]
    for file in candidates:
        if file.is_file() and file.suffix in (".json", ".pkl"):
            return BPETokenizer.load(file) if file.suffix == ".json" else CharTokenizer.load(file)
    raise ValueError(f"{path}: no tokenizer there; give a tokenizer.json, a meta.pkl, or a folder with one")
