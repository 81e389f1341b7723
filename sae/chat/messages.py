"""A question to a model, and the tokens of its answer: plain data. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from sae.config import require


@dataclass(frozen=True)
class Ask:
    """A question. raw: go on with the last message's text instead of answering it. steer, stop: as edits.py reads them.
    sae False: the plain model, nothing watched. temperature 0 takes the best token; top_k draws from the best so many.
    """

    messages: tuple[dict, ...]
    raw: bool = False
    seed: int = 0
    max_new_tokens: int = 128
    temperature: float = 0.8
    top_k: int | None = 200
    top_features: int = 5
    steer: tuple[str, ...] = ()
    stop: tuple[str, ...] = ()
    sae: bool = True

    def __post_init__(self) -> None:
        require(bool(self.messages), "there is no message; write something")
        for m in self.messages:
            good = m.keys() == {"role", "content"} and all(isinstance(v, str) for v in m.values())
            require(good, "a message was given that is not a role and a content, both text")
        require(1 <= self.max_new_tokens <= 100_000, f"max_new_tokens={self.max_new_tokens}; 1 to 100000 was wanted")
        require(0 <= self.temperature <= 100, f"temperature={self.temperature}; 0 to 100 was wanted")
        require(self.top_k is None or self.top_k >= 1, f"top_k={self.top_k}; at least 1 was wanted")
        require(1 <= self.top_features <= 100, f"top_features={self.top_features}; 1 to 100 was wanted")
        require(0 <= self.seed < 2**63, f"seed={self.seed}; a whole number from 0 was wanted")
        n = len(self.steer) + len(self.stop)
        require(n <= 256, f"{n} edits and conditions were given; at most 256 are taken")
        require(
            self.sae or not (self.steer or self.stop), "the plain model cannot be steered; drop no_sae or the edits"
        )


class Feature(NamedTuple):
    """A latent that is active on a token. hookpoint: None where there is one SAE."""

    latent: int
    activation: float
    label: str
    hookpoint: str | None

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in self._asdict().items() if k != "hookpoint" or v is not None}


class Token(NamedTuple):
    """A token as exact text, with its strongest features; of the prompt or of the answer."""

    id: int
    text: str
    features: list[Feature]
    prompt: bool

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, "text": self.text, "features": [f.to_dict() for f in self.features]}
