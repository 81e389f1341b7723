"""Plain data types for a chat request and its answer. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from sae.config import at_least, require


@dataclass(frozen=True)
class Ask:
    """A question. raw: continue the last message's text instead of replying. steer, stop: as edits.py reads them.

    sae=False: the plain model, not watched. temperature 0: always the likeliest token; top_k: sample from the top k.
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
            require(good, "each message needs a role and a content, both text")
        limits = {
            "max_new_tokens": (1, 100_000),
            "temperature": (0, 100),
            "top_features": (1, 100),
            "seed": (0, 2**63 - 1),
        }
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            require(least <= value <= most, f"{name}={value}; it must be {least} to {most}")
        at_least(self, 1, "top_k")
        n = len(self.steer) + len(self.stop)
        require(n <= 256, f"{n} edits and conditions were given; at most 256 are accepted")
        require(self.sae or n == 0, "the plain model cannot be steered; drop no_sae or the edits")


class Feature(NamedTuple):
    """A latent that is active on a token. hookpoint: None if there is only one SAE."""

    latent: int
    activation: float
    label: str
    hookpoint: str | None

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in self._asdict().items() if k != "hookpoint" or v is not None}


class Token(NamedTuple):
    """A token of the prompt or of the answer: its exact text and its strongest features."""

    id: int
    text: str
    features: list[Feature]
    prompt: bool

    def to_dict(self) -> dict[str, Any]:
        return {"id": self.id, "text": self.text, "features": [f.to_dict() for f in self.features]}
