"""Talk to a model, watch its features, steer them:  python -m scripts.chat  (on a page: --web)"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae import log
from sae.chat.messages import Ask, Feature, Token
from sae.chat.server import serve
from sae.config import ChatConfig, UserError, build, from_cli, read_json, require
from sae.edits import parse_edit

if TYPE_CHECKING:
    from sae.chat.conversation import Conversation

HELP = """\
/steer 12:+8 ...    edit features in what follows: +8 -8 add, =4 sets, *0 scales, |0 projects out, <4 caps;
                    +1.5max in units of the largest activation, @generated, ?7>1.5 only where feature 7 is above 1.5
/undo   /clear      take the last change of edits back; drop all edits
/compare            the last question once more, steered and plain, with the same seed
/color 12           shade tokens by this feature; /color alone: by none
/view               switch between running text and a line per token with its features
/feature 12         what is known of a feature
/search WORDS       features by label or number
/explain TOKEN      which features pushed the model towards a token of the last answer
/seed 3   /new      seed of the answers; begin anew, with nothing said before
/save FILE   /replay FILE    keep this conversation; answer a kept one again, and say whether the answers are the same
/quit"""


def open_conversation(c: ChatConfig) -> Conversation:
    """The model and SAEs that a config means, with what is known of their features."""
    from sae.chat.conversation import Conversation, Notes
    from sae.formats import store
    from sae.lm.language_model import best_device
    from scripts.sae_eval import trained_model

    device = best_device(c.device)
    if c.no_sae:
        bare = trained_model(c, {"model_name": "pygpt"}, device)
        assert bare is not None
        return Conversation(bare, {}, {})
    path = c.sae_path or str(store.newest_run("sae_models"))
    folders = store.sae_folders(path) if Path(path).is_dir() else {}
    if not folders:
        folder = store.find_sae(path).parent
        folders = {str(store.load_cfg(path).get("hookpoint") or folder.name): folder}
    saes = {name: store.load_sae(path if len(folders) == 1 else at, device=device) for name, at in folders.items()}
    trained_on = store.load_cfg(next(iter(folders.values())))
    lm = trained_model(c, trained_on, device)
    if lm is None:
        raise UserError(f"'{path}' does not say which model it belongs to; give --model")
    notes = {name: Notes(at / "features", saes[name].d_sae) for name, at in folders.items()}
    return Conversation(lm, saes, notes)


def question(c: ChatConfig, messages: Iterable[dict[str, str]]) -> Ask:
    return Ask(
        tuple(messages), raw=c.raw, seed=c.seed, max_new_tokens=c.max_new_tokens, temperature=c.temperature,
        top_k=c.top_k, top_features=c.top_features, steer=tuple(str(parse_edit(e)) for e in c.steer),
        stop=c.stop_when, sae=not c.no_sae,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------
# one answer


def answer_once(c: ChatConfig, chat: Conversation) -> None:
    """--prompt: the answer on stdout, as text or as one json object."""
    ask = question(c, [{"role": "user", "content": c.prompt or ""}])
    answer: list[Token] = []
    for token in chat.stream(ask):
        if token.prompt:
            continue
        answer.append(token)
        if not c.json:
            print(printable(token.text), end="", flush=True)
    ids = [token.id for token in answer]
    why = None if c.explain is None else chat.explain(ask, c.explain, ids)
    if c.json:
        found = {
            "prompt": c.prompt, "answer": chat.lm.tokenizer.decode(ids), "tokens": [t.to_dict() for t in answer],
            "steer": list(ask.steer), **({} if why is None else {"explain": why}),
        }  # fmt: skip
        print(json.dumps(found))
        return
    print()
    if why is not None:
        print("\n".join(explained(why, c.top_features)))


def explained(why: dict[str, Any], n: int) -> list[str]:
    """Lines that say which features pushed towards a token."""
    head = f"{why['token']!r} at token {why['position']} of the answer: logit {why['logit']:+.2f} over the mean, "
    lines = [f"{head}probability {why['probability']:.3f}; of it"]
    for f in why["features"][: max(n, 10)]:
        lines.append(
            f"  {f['effect']:+8.3f}  {named(f.get('hookpoint'), f['latent'], f['label'])} at {f['activation']:.2f}"
        )
    lines = [why["note"], *lines] if why["note"] else lines
    return [*lines, f"  {why['logit'] - sum(f['effect'] for f in why['features'][: max(n, 10)]):+8.3f}  all else"]


def named(hookpoint: str | None, latent: int, label: str) -> str:
    return printable(f"{hookpoint + '/' if hookpoint else ''}{latent}{' ' + label if label else ''}")


def in_short(f: Feature) -> str:
    """A feature for a line that has others, too."""
    label = f.label if len(f.label) <= 30 else f.label[:27] + "..."
    return f"{named(f.hookpoint, f.latent, label)} {f.activation:.2f}"


def printable(text: str) -> str:
    """What a model writes may hold anything; a terminal would obey its control characters."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


# --------------------------------------------------------------------------------------------------
# a conversation in the terminal


class Terminal:
    """The state of a conversation, and its commands."""

    def __init__(self, c: ChatConfig, chat: Conversation, write: Callable[[str], Any] = sys.stdout.write):
        self.c, self.chat, self.write = c, chat, write
        self.messages: list[dict[str, str]] = []
        self.kept: list[dict[str, Any]] = []  # of every answer: what it was an answer to, and its ids
        self.undo: list[tuple[str, ...]] = []
        self.colour: Feature | None = None
        self.table = False
        self.paints = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self.largest: dict[tuple[str | None, int], float] = {}

    def line(self, text: str = "") -> None:
        self.write(text + "\n")

    def run(self) -> None:
        """Read lines until they end; a mistake costs a sentence."""
        where = ", ".join(self.chat.notes) or "no SAE"
        self.line(f"{self.chat.lm.name}, {where}. Write something, or /help.")
        while True:
            try:
                text = input("> ").strip()
            except EOFError:
                return
            if text in ("/quit", "/exit"):
                return
            try:
                self.take(text)
            except UserError as e:
                self.line(f"! {e}")
            except KeyboardInterrupt:
                self.line(" (stopped)")

    def take(self, text: str) -> None:
        """One line of input."""
        if not text.startswith("/"):
            if text:
                self.say(text)
            return
        name, _, rest = text[1:].partition(" ")
        commands = {
            "help": lambda _: self.line(HELP), "steer": self.steer, "undo": self.take_back, "clear": self.clear,
            "compare": self.compare, "color": self.shade, "colour": self.shade, "view": self.view,
            "feature": self.feature, "search": self.search, "explain": self.explain, "seed": self.seed,
            "new": self.new, "save": self.save, "replay": self.replay,
        }  # fmt: skip
        require(name in commands, f"there is no command /{name}; /help lists them")
        commands[name](rest.strip())

    # answers

    def say(self, text: str) -> None:
        messages = [*self.messages, {"role": "user", "content": text}]
        ask = replace(question(self.c, messages), top_features=100)
        answer = self.show(ask)
        self.messages = [*messages, {"role": "assistant", "content": self.chat.lm.tokenizer.decode(answer)}]
        self.kept.append({"ask": dict(vars(ask)), "ids": answer})

    def show(self, ask: Ask) -> list[int]:
        """Stream an answer; its ids."""
        ids = []
        for token in self.chat.stream(ask):
            for f in token.features:
                key = (f.hookpoint, f.latent)
                self.largest[key] = max(self.largest.get(key, 0.0), f.activation)
            if token.prompt:
                continue
            ids.append(token.id)
            if self.table:
                shown = "   ".join(map(in_short, token.features[: self.c.top_features]))
                text = repr(token.text)
                width = shutil.get_terminal_size((160, 24)).columns - 26
                self.line(f"{self.painted(token, text)}{' ' * (24 - len(text))}  {shown[: max(20, width)]}")
            else:
                self.write(self.painted(token, printable(token.text)))
                sys.stdout.flush()
        if not self.table:
            self.line()
        return ids

    def painted(self, token: Token, text: str) -> str:
        """The text, on a ground that is the stronger the more active the chosen feature is."""
        found = [f for f in token.features if self.colour and f[::3] == self.colour[::3]]
        if not found or not self.paints:
            return text
        known = self.chat.notes[found[0].hookpoint or next(iter(self.chat.notes))].largest[found[0].latent]
        most = float(known) if known > 0 else self.largest[found[0][::-1][0], found[0].latent]
        share = min(1.0, found[0].activation / most)
        return f"\x1b[48;2;{int(40 + 215 * share)};{int(40 + 80 * share)};20m{text}\x1b[0m"

    def last(self) -> Ask:
        require(bool(self.kept), "nothing was answered yet; write something first")
        return from_json(self.kept[-1]["ask"])

    def compare(self, _: str) -> None:
        steered = replace(self.last(), steer=question(self.c, [{"role": "user", "content": ""}]).steer)
        require(bool(steered.steer), "nothing is steered; /steer something first")
        self.line(f"--- plain, seed {steered.seed}")
        self.show(replace(steered, steer=()))
        self.line(f"--- {' '.join(steered.steer)}, seed {steered.seed}")
        self.show(steered)

    def explain(self, text: str) -> None:
        ask, ids = self.last(), self.kept[-1]["ids"]
        for line in explained(self.chat.explain(ask, text, ids), self.c.top_features):
            self.line(line)

    # settings

    def steer(self, text: str) -> None:
        edits = text.split()
        require(self.chat.live is not None, "there is no SAE to steer with")
        if self.chat.live is not None:
            self.chat.live.steering(*edits)  # raises for an edit that cannot be
        self.change((*self.c.steer, *edits) if edits else self.c.steer)

    def change(self, steer: Sequence[str]) -> None:
        if tuple(steer) != self.c.steer:
            self.undo.append(self.c.steer)
            self.c = replace(self.c, steer=tuple(steer))
        self.line(f"edits: {' '.join(self.c.steer) or 'none'}")

    def take_back(self, _: str) -> None:
        require(bool(self.undo), "there is nothing to take back")
        self.c = replace(self.c, steer=self.undo.pop())
        self.line(f"edits: {' '.join(self.c.steer) or 'none'}")

    def clear(self, _: str) -> None:
        self.change(())

    def seed(self, text: str) -> None:
        good = text.isdecimal() and len(text) < 19
        require(good, f"seed '{text}'; a whole number of at most 18 digits was wanted")
        self.c = replace(self.c, seed=int(text))

    def new(self, _: str) -> None:
        self.messages, self.kept = [], []

    def view(self, _: str) -> None:
        self.table = not self.table

    def shade(self, text: str) -> None:
        self.colour = (
            Feature(self.latent(text)[1], 0.0, "", self.latent(text)[0] if len(self.chat.notes) > 1 else None)
            if text
            else None
        )

    # features

    def latent(self, text: str) -> tuple[str, int]:
        """`12` or `HOOKPOINT/12` -> the SAE's name and the latent."""
        place, _, number = text.rpartition("/")
        require(number.isdecimal() and len(number) < 12, f"'{text}' is no feature; write its number")
        require(self.chat.live is not None, "there is no SAE, so there are no features")
        assert self.chat.live is not None
        return self.chat.live.name_of(place or None, int(number)), int(number)

    def feature(self, text: str) -> None:
        name, latent = self.latent(text)
        for line in described(self.chat, name, latent):
            self.line(printable(line))

    def search(self, text: str) -> None:
        require(bool(text), "say what to look for: /search docstring")
        several = len(self.chat.notes) > 1
        for name, notes in self.chat.notes.items():
            for latent in notes.search(text):
                self.line(named(name if several else None, latent, notes.labels.get(latent, "")))
        if not any(notes.labels for notes in self.chat.notes.values()):
            self.line("(no labels: python -m scripts.sae_viz --all_features makes some)")

    # keeping

    def save(self, text: str) -> None:
        require(bool(text), "give the file to save to: /save talk.json")
        from sae.files import write_json

        write_json({"model": self.chat.lm.name, "saes": list(self.chat.notes), "answers": self.kept}, Path(text))
        self.line(f"{len(self.kept)} answers saved to {text}")

    def replay(self, text: str) -> None:
        kept = read_json(text)
        answers = kept.get("answers") if isinstance(kept, dict) else None
        require(isinstance(answers, list), f"'{text}' is no saved conversation; /save writes one")
        self.new("")
        for one in answers or ():
            ask = from_json(one.get("ask"))
            self.line(
                f"> {printable(ask.messages[-1]['content'])}" + (f"   [{' '.join(ask.steer)}]" if ask.steer else "")
            )
            ids = self.show(ask)
            self.line("(the same answer)" if ids == one.get("ids") else "(another answer than the saved one)")
            self.messages = [
                *map(dict, ask.messages),
                {"role": "assistant", "content": self.chat.lm.tokenizer.decode(ids)},
            ]
            self.kept.append({"ask": dict(vars(ask)), "ids": ids})


def from_json(value: Any) -> Ask:
    """A kept question. Raises UserError for anything else."""
    require(isinstance(value, dict) and "messages" in value, "a kept answer lacks its question; save it again")
    return build(Ask, value)


def described(chat: Conversation, name: str, latent: int) -> list[str]:
    """What is known of a feature, in a few lines."""
    record, sae = chat.notes[name].record(latent), chat.live.saes[name] if chat.live else None
    assert sae is not None
    lines = [f"feature {latent} of {name}: {record.get('label') or 'no label'}"]
    if record:
        lines.append(f"  active on {100 * record['density']:.3g}% of tokens, at most {record['max_activation']:.4g}")
    for what, tokens in zip(("promotes", "suppresses"), chat.tokens_of(sae.W_dec[latent].detach()), strict=True):
        lines += [f"  {what:10} " + "  ".join(map(repr, tokens))] if tokens else []
    for context in record.get("contexts", [])[:3]:
        tokens = [f"[{t}]" if v > 0 else t for t, v in zip(context["tokens"], context["values"], strict=True)]
        lines.append("  " + "".join(tokens).replace("\n", "\\n"))
    return lines


def main(argv: list[str]) -> None:
    c = from_cli(ChatConfig, argv, prog="python -m scripts.chat", description=__doc__)
    chat = open_conversation(c)
    if c.prompt is not None:
        answer_once(c, chat)
    elif c.web:
        start = question(c, [{"role": "user", "content": ""}])
        log.say(f"{chat.lm.name}, {', '.join(chat.notes) or 'no SAE'}")
        serve(
            chat, {name: notes.folder for name, notes in chat.notes.items()}, start, host=c.host, port=c.port,
            max_waiting=c.max_waiting, most_tokens=max(1024, c.max_new_tokens), say=log.say,
        )  # fmt: skip
    else:
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # input() then has a history
        Terminal(c, chat).run()


if __name__ == "__main__":
    log.run_script(main)
