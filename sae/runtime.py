"""Watch and steer latents in a live model, during a prompt and generation, with or without a KV cache.

    live = InterpretableModel(model, saes)
    with live.track(top_k=5) as seen, live.steer("123:+8", "45:*0"):
        model.generate(...)
    seen.features().values           # (N, T, 5), of every token the model read

Nothing waits for the device. Outside of every `with` the model is as it was: no hook stays, no weight is touched.
Edits at a hookpoint come first, so what is tracked is what the model goes on with. A module compiled by torch.compile
does not run hooks added later: give the uncompiled one. One thread at a time.

Letters: N sequences, T positions, B = N * T tokens, D width, F latents, K latents kept, W latents watched, E edits.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sae import hooks
from sae.config import UserError, did_you_mean, require
from sae.edits import Coefficients, Condition, Edit, parse_condition, parse_edit
from sae.formats.store import load_saes
from sae.hookpoints import SAEName, places, resolve, split
from sae.lm.language_model import LanguageModel
from sae.models import SAE

ID_NAMES = ("input_ids", "idx", "ids", "tokens")  # names of the argument; masks and positions are integers too
Read = Callable[[Tensor], tuple[Tensor, ...]]  # x (B, D) -> the tensors to keep, each (B, ...)
B = TypeVar("B", bound="Block")


class Features(NamedTuple):
    """The strongest latents of each token, strongest first: indices and values (N, T, K); a value of 0: not active."""

    indices: Tensor
    values: Tensor


@dataclass(frozen=True)
class Forward:
    """What one forward of the model was given: ids (N, T), None if it takes none; the positions cached before."""

    ids: Tensor | None
    past: int

    @classmethod
    def of(cls, args: tuple, kwargs: Mapping[str, Any]) -> Forward:
        is_ids = lambda v: isinstance(v, Tensor) and v.ndim == 2 and not v.is_floating_point() and v.dtype != torch.bool
        may_be = (*map(kwargs.get, ID_NAMES), *args)
        past = next(filter(None, map(_cached, (*args, *kwargs.values()))), 0)
        return cls(next(filter(is_ids, may_be), None), past)


def _cached(value: Any) -> int:
    """How many positions a KV cache holds: transformers', nanochat's or model.py's; 0 for anything else."""
    for name in ("get_seq_length", "get_pos"):
        if callable(found := getattr(value, name, None)):
            return int(found())
    length = getattr(value, "length", None)
    return length if type(length) is int else 0


class Block:
    """Something in force within its `with`, which can be entered again and again: for several texts written in turn."""

    live: InterpretableModel
    names: list[str]  # of the SAEs that take part

    def __enter__(self: B) -> B:
        self.live.rehook([*self.live.blocks, self])
        return self

    def __exit__(self, *error: object) -> None:
        rest = list(self.live.blocks)
        rest.remove(self)
        self.live.rehook(rest)


# --------------------------------------------------------------------------------------------------
# tracking


class Track(Block):
    """What hookpoints held, token by token, in the sequence that the model read last: prompt and answer.

    A forward that continues a KV cache adds to the record; one that begins anew (no cache, or a new prompt) replaces
    it. Stays readable after its `with`.
    """

    def __init__(self, live: InterpretableModel, readers: Mapping[str, Read]):
        self.live, self.names, self._readers = live, list(readers), readers
        self._parts: dict[str, list[tuple[int, tuple[Tensor, ...]]]] = {name: [] for name in readers}

    def add(self, name: str, x: Tensor, past: int) -> None:
        """Record x, which an SAE's hookpoint holds: (N, T, D), or (B, D) from a module that knows no positions."""
        found = self._readers[name](x.reshape(-1, x.shape[-1]))
        parts = self._parts[name]
        while parts and parts[-1][0] >= past:
            parts.pop()
        if parts and parts[-1][0] + parts[-1][1][0].shape[-2] > past:  # a cache that was cut in the middle of a part
            start, ys = parts[-1]
            parts[-1] = start, tuple(y[..., : past - start, :] for y in ys)
        parts.append((past, tuple(y.view(*x.shape[:-1], -1) for y in found)))

    def _whole(self, name: str | None, last: bool) -> tuple[Tensor, ...]:
        several = f"{len(self.names)} SAEs are tracked; name one: {', '.join(self.names)}"
        require(name is not None or len(self.names) == 1, several)
        name = self.names[0] if name is None else name
        require(name in self._parts, f"'{name}' is not tracked; {', '.join(self.names)} are")
        parts = [part for _, part in self._parts[name]]
        require(bool(parts), f"the model has not run to '{name}' since tracking began; run it inside the `with`")
        if last:
            return tuple(y[..., -1:, :] for y in parts[-1])
        N = parts[-1][0].shape[:-2]  # one prompt can go on in several ways: its cache is then repeated
        return tuple(torch.cat([y.expand(*N, -1, -1) for y in ys], dim=-2) for ys in zip(*parts, strict=True))

    def features(self, hookpoint: str | None = None, *, last: bool = False) -> Features:
        """The strongest latents of every token, or of the newest only. hookpoint: needed if several are tracked."""
        found = self._whole(hookpoint, last)
        require(len(found) == 2, "chosen latents are tracked here; read them with values()")
        order = found[1].abs().argsort(dim=-1, descending=True)
        return Features(*(y.gather(-1, order) for y in found))

    def values(self, hookpoint: str | None = None, *, last: bool = False) -> Tensor:
        """(N, T, W): activations of the chosen latents, in the order they were given."""
        found = self._whole(hookpoint, last)
        require(len(found) == 1, "no latents were chosen to be tracked here; read the strongest with features()")
        return found[0]


def _strongest(sae: SAE, top_k: int) -> Read:
    """Reads indices and values (B, K) of each token's strongest latents."""

    @torch.no_grad()
    def read(x: Tensor) -> tuple[Tensor, ...]:
        if len(x) > 1024:  # some kinds make (tokens, F) on the way: not of a whole long prompt at once
            return tuple(torch.cat(ys) for ys in zip(*map(read, x.split(1024)), strict=True))
        return sae.encode_codes(x).strongest(min(top_k, sae.d_sae))[:2]  # type: ignore[return-value]

    return read


def _chosen(sae: SAE, latents: Sequence[int]) -> Read:
    """Reads these latents' activations (B, W), as `encode` gives them; encodes no others if latents are independent."""
    chosen = torch.tensor(list(latents), device=sae.W_dec.device)
    part = sae.part(chosen) if sae.independent else None
    own, place = chosen.unique(return_inverse=True)

    @torch.no_grad()
    def read(x: Tensor) -> tuple[Tensor, ...]:
        return (sae.encode_codes(x).at(own, sae.d_sae)[:, place] if part is None else part.encode(x),)

    return read


# --------------------------------------------------------------------------------------------------
# steering


class History:
    """Which of the tokens read so far were generated, as far as forwards tell: those that came one by one."""

    def __init__(self) -> None:
        self.ids: Tensor | None = None  # (N, S)
        self.generated: Tensor | None = None  # (N, S) bool
        self.goes_on: Tensor | bool = False  # whether the newest forward goes on with the sequence before it

    def add(self, now: Forward) -> Tensor | None:
        """(N, T) bool for the tokens of this forward; None if the model takes no ids."""
        if now.ids is None:
            return None
        T = now.ids.shape[1]
        old, was = self.ids, self.generated
        mask = torch.full_like(now.ids, now.past > 0 and T == 1, dtype=torch.bool)
        self.ids, self.generated, self.goes_on = now.ids, mask, now.past > 0
        if old is None or was is None or len(old) != len(now.ids):
            return mask
        if now.past:  # several tokens at once on top of a cache are a next prompt
            self.ids, self.generated = torch.cat((old, now.ids), 1), torch.cat((was, mask), 1)
        elif 1 < T <= old.shape[1] + 1:
            # without a cache all is read again, with one token more; a full context has lost its beginning
            self.goes_on = (now.ids[:, :-1] == old[:, 1 - T :]).all()
            mask = self.generated = torch.where(self.goes_on, F.pad(was[:, 1 - T :], (0, 1), value=True), mask)
        return mask


class Steering(Block):
    """Edits in force. `stopped` (N,) bool, on the device: whether a stop condition has held at a generated token.

    With transformers: generate(..., stopping_criteria=[lambda ids, scores: steering.stopped]).
    """

    def __init__(self, live: InterpretableModel, edits: Sequence[Edit], stop: Sequence[Condition]):
        self.live = live
        place = lambda e: live.name_of(e.hookpoint, e.latent)
        self.edits: dict[str, list[Edit]] = defaultdict(list)
        for e in edits:
            self.edits[place(e)].append(e)
        self._stop = [(place(c), c) for c in stop]
        needs: dict[str, list[int]] = defaultdict(list)  # by SAE, the latents whose activation must be read
        read: list[Edit | Condition] = [e for e in edits if e.reads]
        for one in (*read, *stop, *(e.when for e in edits if e.when is not None)):
            needs[place(one)].append(one.latent)
        self._needs = {name: list(dict.fromkeys(latents)) for name, latents in needs.items()}
        self.names = [name for name in live.saes if name in self.edits or name in self._needs]
        self._readers = {name: _chosen(live.saes[name], latents) for name, latents in self._needs.items()}
        self._coefficients = {
            name: Coefficients.of(es, [live.strength(e, name) for e in es], live.saes[name].W_dec)
            for name, es in self.edits.items()
        }
        self._history = History() if stop or any(e.at != "all" for e in edits) else None
        self.stopped: Tensor | None = None
        self._f: dict[tuple[str, int], Tensor] = {}  # activations read in this forward: (B,) by SAE and latent
        self._generated: Tensor | None = None  # (B,) bool; None if it is not known or not asked for
        self._ordinary: Tensor | None = None  # (B,) bool: no special token

    def begin(self, now: Forward) -> None:
        """A forward of the model starts."""
        self._f.clear()
        if self._history is not None:
            generated = self._history.add(now)
            self._generated = None if generated is None else generated.flatten()
            self.stopped = None if self.stopped is None else self.stopped & self._history.goes_on
        special = self.live.special_ids
        self._ordinary = None if now.ids is None or special is None else ~torch.isin(now.ids, special).flatten()

    @torch.no_grad()
    def read(self, name: str, x: Tensor) -> None:
        """Read the activations that edits and conditions need from x (N, T, D), an SAE's input."""
        if name not in self._readers:
            return
        (found,) = self._readers[name](x.reshape(-1, x.shape[-1]))
        self._f.update({(name, latent): found[:, i] for i, latent in enumerate(self._needs[name])})
        for c in (c for place, c in self._stop if place == name):
            met = self._f[name, c.latent] > c.above
            met = met if self._generated is None else met & self._generated
            met = met.view(x.shape[:-1]).flatten(1).any(1) if x.ndim > 2 else met
            before = self.stopped
            self.stopped = met if before is None or before.shape != met.shape else before | met

    @torch.no_grad()
    def delta(self, name: str, y: Tensor, unit: Tensor | None) -> Tensor:
        """What to add to y (N, T, D), which an SAE's decoder writes to. unit (B, 1): the SAE's unit at each token."""
        edits, coefficients = self.edits[name], self._coefficients[name]
        flat, f = y.reshape(-1, y.shape[-1]).to(coefficients.rows.dtype), None
        if any(e.reads for e in edits):
            zero = flat.new_zeros(len(flat))
            f = torch.stack([self._f[name, e.latent] if e.reads else zero for e in edits], 1)
        c = coefficients.of_tokens(flat if unit is None else flat / unit, f)
        places = [self._where(e, len(flat)) for e in edits]
        if any(where is not None for where in places):
            ones = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
            c = c * torch.stack([ones if where is None else where for where in places], 1)
        delta = c @ coefficients.rows
        delta = delta if unit is None else delta * unit
        return (delta if delta.ndim == 1 else delta.view(y.shape)).to(y.dtype)

    def _where(self, e: Edit, n: int) -> Tensor | None:
        """(B,) bool: the tokens at which an edit applies; None for all."""
        masks = []
        if not e.specials and self._ordinary is not None and len(self._ordinary) == n:
            masks.append(self._ordinary)
        if e.at != "all" and self._generated is not None and len(self._generated) == n:
            masks.append(self._generated if e.at == "generated" else ~self._generated)
        if e.when is not None:
            key = (self.live.name_of(e.when.hookpoint, e.when.latent), e.when.latent)
            require(key in self._f, f"'{e.when}' is known only after the place where '{e}' edits; edit a later one")
            masks.append(self._f[key] > e.when.above)
        return functools.reduce(torch.logical_and, masks) if masks else None


# --------------------------------------------------------------------------------------------------
# the model


class InterpretableModel:
    """A model with SAEs that watch and steer it.

    model: any nn.Module, or a LanguageModel. saes: {hookpoint: SAE}, or a folder of them; they are put in evaluation
    mode. Two SAEs at one hookpoint go by `hookpoint/name`. special_ids: tokens that edits leave alone (default: the
    LanguageModel's, or those that a HuggingFace model's config names). max_activations: {hookpoint: (F,)}, for
    strengths in units of them. Raises UserError for an unknown hookpoint and for a compiled model.
    """

    def __init__(
        self,
        model: nn.Module | LanguageModel,
        saes: Mapping[str, SAE] | str | Path,
        *,
        special_ids: Collection[int] | None = None,
        max_activations: Mapping[str, Tensor] | None = None,
    ):
        self.module: nn.Module = model.module if isinstance(model, LanguageModel) else model
        compiled = any(
            hasattr(m, "_orig_mod") or getattr(m, "_compiled_call_impl", None) for m in self.module.modules()
        )
        require(not compiled, "a compiled model does not run hooks added later; give the uncompiled one")
        if special_ids is None:
            special_ids = model.tokenizer.special_ids if isinstance(model, LanguageModel) else _named_ids(model)
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        self.special_ids = torch.tensor(sorted(special_ids), device=device) if special_ids else None
        found = load_saes(saes) if isinstance(saes, (str, Path)) else saes
        require(bool(found), "no SAE was given; give {hookpoint: SAE}")
        self.saes = {name: sae.to(device).eval().pack_() for name, sae in found.items()}
        self.max_activations = dict(max_activations or {})
        for name, largest in self.max_activations.items():
            wanted = (self.saes[self.name_of(name)].d_sae,)
            got = tuple(largest.shape)
            require(got == wanted, f"max_activations['{name}'] is {got}; {wanted} was wanted")
        here = {name for name, _ in self.module.named_modules()}
        known = lambda at: at if split(at)[0] in here else resolve(self.module, hookpoints=[at])[0]
        self._places = {
            name: places(known(SAEName.parse(name).hookpoint), sae.config.transcode) for name, sae in self.saes.items()
        }
        with hooks.hooked(self.module, {place: lambda _: None for two in self._places.values() for place in two}):
            pass  # every hookpoint is there
        self.blocks: list[Block] = []  # that are in force
        self._now = Forward(None, 0)
        self._hooks = ExitStack()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward."""
        return self.module(*args, **kwargs)

    def places(self, name: str) -> tuple[str, str]:
        """The hookpoints that an SAE reads and writes: different ones for transcoders only."""
        return self._places[name]

    def name_of(self, hookpoint: str | None, latent: int = 0) -> str:
        """The SAE meant by a hookpoint (None: the only one), which has this latent."""
        if hookpoint is None:
            several = f"there are {len(self.saes)} SAEs; write which one latent {latent} is of, as in "
            require(len(self.saes) == 1, f"{several}{next(iter(self.saes))}/{latent}")
            hookpoint = next(iter(self.saes))
        if hookpoint not in self.saes:
            known = did_you_mean(hookpoint, self.saes) or f"; there are {', '.join(self.saes)}"
            raise UserError(f"no SAE goes by '{hookpoint}'{known}")
        n = self.saes[hookpoint].d_sae
        require(0 <= latent < n, f"latent {latent} was asked for; this SAE has 0 to {n - 1}")
        return hookpoint

    def strength(self, e: Edit, name: str) -> float:
        """An edit's value in activation units."""
        if e.unit == "absolute":
            return e.value
        if name not in self.max_activations:
            raise UserError(f"the largest activations of '{name}' are not known; give '{e}' in activation units")
        largest = float(self.max_activations[name][e.latent])
        require(largest > 0, f"latent {e.latent} of '{name}' was never seen active; give '{e}' in activation units")
        return e.value * largest

    def track(
        self, hookpoints: Sequence[str] | None = None, *, top_k: int = 32, latents: Sequence[int] | None = None
    ) -> Track:
        """Within its `with`, record the top_k strongest latents of every token, or these latents, at these hookpoints
        (default: all with an SAE). Costs a run of the encoder per token, except for chosen latents of kinds whose
        latents are independent: those cost their own columns.
        """
        require(top_k >= 1, f"top_k={top_k}; it must be at least 1")
        require(latents is None or len(latents) > 0, "no latent was given; give some, or None for the strongest")
        names = list(self.saes if hookpoints is None else hookpoints)
        for name in names:
            for latent in latents or (0,):
                self.name_of(name, latent)
        read = lambda sae: _strongest(sae, top_k) if latents is None else _chosen(sae, latents)
        return Track(self, {name: read(self.saes[name]) for name in names})

    def steer(self, *edits: Edit | str, stop: Sequence[Condition | str] = ()) -> Steering:
        """Within its `with`, edit latents as edits.py describes; blocks nest, and their edits add up.

        stop: conditions that set `stopped`. Raises UserError for an unknown latent or hookpoint.
        """
        return Steering(
            self,
            [parse_edit(e) if isinstance(e, str) else e for e in edits],
            [parse_condition(c) if isinstance(c, str) else c for c in stop],
        )

    # ----------------------------------------------------------------------------------------------
    # hooks

    def rehook(self, blocks: list[Block]) -> None:
        """Put these blocks in force: one hook at every place that any of them needs, none elsewhere."""
        self._hooks.close()
        self.blocks = blocks
        self._tracks = [b for b in blocks if isinstance(b, Track)]
        self._steerings = [b for b in blocks if isinstance(b, Steering)]
        wanted = {name for block in blocks for name in block.names}
        if not wanted:
            return
        begin = self.module.register_forward_pre_hook(self._begin, with_kwargs=True)
        self._hooks.callback(begin.remove)
        for name in (n for n in self.saes if n in wanted):  # at one place they run in turn, on the edited tensor
            reads, writes = self.places(name)
            sees = {writes: functools.partial(self._write, name), reads: functools.partial(self._see, name)}
            self._hooks.enter_context(hooks.hooked(self.module, sees))

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        self._now = Forward.of(args, kwargs)
        for steering in self._steerings:
            steering.begin(self._now)

    def _see(self, name: str, x: Tensor) -> Tensor | None:
        for steering in self._steerings:
            steering.read(name, x)
        reads, writes = self.places(name)
        new = self._write(name, x) if reads == writes else None
        for track in self._tracks:
            if name in track.names:
                track.add(name, x if new is None else new, self._now.past)
        return new

    def _write(self, name: str, y: Tensor) -> Tensor | None:
        steerings = [s for s in self._steerings if name in s.edits]
        if not steerings:
            return None
        with torch.no_grad():
            unit = self.saes[name].unit(y)
        return functools.reduce(torch.add, (s.delta(name, y, unit) for s in steerings), y)


def _named_ids(module: nn.Module) -> set[int]:
    """The special tokens that a HuggingFace model's own settings name."""
    found: list[Any] = []
    for config in (getattr(module, "config", None), getattr(module, "generation_config", None)):
        for kind in ("bos", "eos", "pad", "sep", "cls", "mask"):
            ids = getattr(config, f"{kind}_token_id", None)
            found += ids if isinstance(ids, list) else [ids]
    return {i for i in found if type(i) is int}
