"""Steering edits: how they are written, and their arithmetic. Knows no models and no hooks, and loads no torch.

With f the latent's activation, d its decoder row and p = x.d / |d|^2 what x holds along d, an edit adds c * d to x:

    add v          12:+8      c = v
    set v          12:=4      c = v - f           (clamp to v, whether the latent is active or not)
    scale by v     12:*0      c = (v - 1) f       (0 ablates)
    orthogonal v   12:|8      c = v - p           (the whole direction becomes v; 0 projects it out)
    cap at v       12:<4      c = min(0, v - p)

Nothing else of x changes, so the SAE's error term stays. Edits of several latents are computed from the same x.
After the value: `max` (in units of the latent's largest activation), `@prompt` or `@generated` (only there), `?7>1.5`
(only at tokens where latent 7 exceeds 1.5). Before the latent: `HOOKPOINT/`, if there are several SAEs.

Letters: B tokens, D width, E edits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from sae.config import UserError, require

if TYPE_CHECKING:
    from torch import Tensor

Op = Literal["add", "set", "scale", "orthogonal", "cap"]
SIGNS: dict[str, Op] = {"+": "add", "-": "add", "=": "set", "*": "scale", "|": "orthogonal", "<": "cap"}
NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
LATENT = r"(?:(?P<{0}place>[^\s:?>]+)/)?(?P<{0}latent>\d{{1,12}})"
CONDITION = rf"{LATENT.format('when_')}\s*>\s*(?P<above>{NUMBER})"
EDIT = re.compile(
    rf"{LATENT.format('')}:(?P<sign>[-+=*|<])(?P<value>{NUMBER})(?P<unit>max)?(?:@(?P<at>\w+))?(?:\?{CONDITION})?"
)


@dataclass(frozen=True)
class Condition:
    """True at tokens where the latent's activation exceeds `above`. hookpoint: None if there is only one SAE."""

    latent: int
    above: float
    hookpoint: str | None = None

    def __str__(self) -> str:
        return f"{_place(self.hookpoint)}{self.latent}>{self.above:g}"


@dataclass(frozen=True)
class Edit:
    """One latent's edit. unit "max": the value is in units of the latent's largest activation (not for scale).

    at: prompt tokens, generated ones, or all; special tokens only if `specials`. when: only at tokens where it holds.
    hookpoint: None if there is only one SAE.
    """

    latent: int
    op: Op
    value: float
    hookpoint: str | None = None
    unit: Literal["absolute", "max"] = "absolute"
    at: Literal["all", "prompt", "generated"] = "all"
    when: Condition | None = None
    specials: bool = False

    def __post_init__(self) -> None:
        require(self.latent >= 0, f"latent {self.latent}: latents are numbered from 0")
        require(self.op in get_args(Op), f"'{self.op}' is not an edit; expected one of {', '.join(get_args(Op))}")
        require(self.at in ("all", "prompt", "generated"), f"at='{self.at}'; expected all, prompt or generated")
        require(abs(self.value) < 1e9, f"value={self.value}; it must be finite and below 1e9")
        require(self.op != "scale" or self.unit == "absolute", "a scale has no unit; write it without 'max'")

    @property
    def reads(self) -> bool:
        """Whether it depends on the latent's activation."""
        return self.op == "set" or (self.op == "scale" and self.value != 1)

    def __str__(self) -> str:
        sign = next(s for s, op in SIGNS.items() if op == self.op)
        value = f"{self.value:+g}" if self.op == "add" else f"{sign}{self.value:g}"
        text = f"{_place(self.hookpoint)}{self.latent}:{value}{'max' if self.unit == 'max' else ''}"
        return text + (f"@{self.at}" if self.at != "all" else "") + (f"?{self.when}" if self.when else "")


def _place(hookpoint: str | None) -> str:
    return f"{hookpoint}/" if hookpoint else ""


def parse_edit(text: str) -> Edit:
    """The edit that a text such as `12:+8`, `12:=4`, `12:*0`, `12:+0.5max@generated?7>1.5` means."""
    m = EDIT.fullmatch(text.strip())
    if m is None:
        raise UserError(
            f"'{text}' is not a valid edit; write LATENT:+8 to add, :=4 set, :*0 scale, :|0 project out, :<4 cap"
        )
    value = float(m["value"]) * (-1 if m["sign"] == "-" else 1)
    where: Any = {"unit": "max" if m["unit"] else "absolute", "at": m["at"] or "all"}
    when = _condition(m) if m["above"] else None
    return Edit(int(m["latent"]), SIGNS[m["sign"]], value, m["place"], when=when, **where)


def parse_condition(text: str) -> Condition:
    """The condition that a text such as `45>3` means."""
    m = re.fullmatch(CONDITION, text.strip())
    if m is None:
        raise UserError(f"'{text}' is not a valid condition; write LATENT>THRESHOLD, such as 45>3")
    return _condition(m)


def _condition(m: re.Match[str]) -> Condition:
    return Condition(int(m["when_latent"]), float(m["above"]), m["when_place"])


class Coefficients(NamedTuple):
    """c = start + per_f * f + per_p * p, at most 0 if capped: (E,) each, for edits with decoder rows (E, D).

    along: whether any edit depends on p.
    """

    start: Tensor
    per_f: Tensor
    per_p: Tensor
    capped: Tensor
    rows: Tensor
    along: bool

    @classmethod
    def of(cls, edits: Sequence[Edit], values: Sequence[float], W_dec: Tensor) -> Coefficients:
        """values: those of the edits, in activation units."""
        new = lambda numbers: W_dec.new_tensor(list(numbers))
        along = [e.op in ("orthogonal", "cap") for e in edits]
        return cls(
            start=new(0.0 if e.op == "scale" else v for e, v in zip(edits, values, strict=True)),
            per_f=new({"set": -1.0, "scale": e.value - 1}.get(e.op, 0.0) for e in edits),
            per_p=new(-float(a) for a in along),
            capped=new(e.op == "cap" for e in edits) > 0,
            rows=W_dec[[e.latent for e in edits]].detach(),
            along=any(along),
        )

    def of_tokens(self, x: Tensor, f: Tensor | None) -> Tensor:
        """(B, E), or (E,) if they are the same for all tokens. x (B, D); f (B, E), None if no edit reads it."""
        c = self.start if f is None else self.start + self.per_f * f
        if self.along:
            p = x @ self.rows.t() / self.rows.square().sum(1).clamp(min=1e-30)
            c = c + self.per_p * p
            c = c.clamp(max=0).where(self.capped, c)
        return c
