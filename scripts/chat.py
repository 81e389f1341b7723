"""Talk to a model, watch its features, steer them:  python -m scripts.chat  (on a page: --web)"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae import log
from sae.chat.messages import Ask, Feature, Token
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
    from sae.rundir import trained_model

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


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def question(c: ChatConfig, *messages: dict[str, str]) -> Ask:
    """The question that these messages make with a config's settings."""
    same: Any = {n: getattr(c, n) for n in "raw seed max_new_tokens temperature top_k top_features".split()}
    return Ask(messages, **same, steer=as_written(c.steer), stop=c.stop_when, sae=not c.no_sae)


def as_written(edits: Sequence[str]) -> tuple[str, ...]:
    """Edits as edits.py writes them. Raises UserError for a text that is none."""
    return tuple(str(parse_edit(e)) for e in edits)


# --------------------------------------------------------------------------------------------------
# one answer


def answer_once(c: ChatConfig, chat: Conversation) -> None:
    """--prompt: the answer on stdout, as text or as one json object."""
    ask = question(c, user(c.prompt or ""))
    answer: list[Token] = []
    for token in (t for t in chat.stream(ask) if not t.prompt):
        answer.append(token)
        if not c.json:
            print(printable(token.text), end="", flush=True)
    ids = [token.id for token in answer]
    why = None if c.explain is None else chat.explain(ask, c.explain, ids)
    if c.json:
        found = {"prompt": c.prompt, "answer": chat.lm.tokenizer.decode(ids), "tokens": [t.to_dict() for t in answer]}
        print(json.dumps({**found, "steer": list(ask.steer), **({"explain": why} if why else {})}))
        return
    print()
    if why is not None:
        print("\n".join(explained(why, c.top_features)))


def explained(why: dict[str, Any], n: int) -> list[str]:
    """Lines that say which features pushed towards a token."""
    shown = why["features"][: max(n, 10)]
    head = f"{why['token']!r} at token {why['position']} of the answer: logit {why['logit']:+.2f} over the mean, "
    lines = [why["note"]] if why["note"] else []
    lines.append(f"{head}probability {why['probability']:.3f}; of it")
    for f in shown:
        name = named(f.get("hookpoint"), f["latent"], f["label"])
        lines.append(f"  {f['effect']:+8.3f}  {name} at {f['activation']:.2f}")
    return [*lines, f"  {why['logit'] - sum(f['effect'] for f in shown):+8.3f}  all else"]


def named(hookpoint: str | None, latent: int, label: str) -> str:
    return printable(f"{hookpoint + '/' if hookpoint else ''}{latent}{' ' + label if label else ''}")


def in_short(f: Feature) -> str:
    """A feature for a line that has others, too."""
    label = f.label if len(f.label) <= 30 else f.label[:27] + "..."
    return f"{named(f.hookpoint, f.latent, label)} {f.activation:.2f}"


def printable(text: str) -> str:
    """Escapes control characters, which a model may write and a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


# --------------------------------------------------------------------------------------------------
# a conversation in the terminal

COMMANDS = "help steer undo clear compare color colour view feature search explain seed new save replay".split()


class Terminal:
    """The state of a conversation. Each command is the method of its name, called with the rest of the line."""

    def __init__(self, c: ChatConfig, chat: Conversation, write: Callable[[str], Any] = sys.stdout.write):
        self.c, self.chat, self.write = c, chat, write
        self.messages: list[dict[str, str]] = []
        self.kept: list[dict[str, Any]] = []  # every question with the ids of its answer
        self.before: list[tuple[str, ...]] = []  # the edits before each change of them
        self.shade: Feature | None = None
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
        if text.startswith("/"):
            name, _, rest = text[1:].partition(" ")
            require(name in COMMANDS, f"there is no command /{name}; /help lists them")
            getattr(self, name)(rest.strip())
        elif text:
            self.answer(replace(question(self.c, *self.messages, user(text)), top_features=100))

    def help(self, _: str) -> None:
        self.line(HELP)

    # answers

    def answer(self, ask: Ask) -> list[int]:
        """Answer, and go on from there; the answer's ids."""
        ids = self.show(ask)
        reply = {"role": "assistant", "content": self.chat.lm.tokenizer.decode(ids)}
        self.messages = [*ask.messages, reply]
        self.kept.append({"ask": dict(vars(ask)), "ids": ids})
        return ids

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
        """The text on a background that is the brighter the more active the chosen feature is."""
        shade = self.shade
        found = [f for f in token.features if shade and (f.hookpoint, f.latent) == (shade.hookpoint, shade.latent)]
        if not found or not self.paints:
            return text
        (f,) = found
        known = float(self.chat.notes[f.hookpoint or next(iter(self.chat.notes))].largest[f.latent])
        share = min(1.0, f.activation / (known if known > 0 else self.largest[f.hookpoint, f.latent]))
        return f"\x1b[48;2;{int(40 + 215 * share)};{int(40 + 80 * share)};20m{text}\x1b[0m"

    def last(self) -> Ask:
        require(bool(self.kept), "nothing was answered yet; write something first")
        return from_json(self.kept[-1]["ask"])

    def compare(self, _: str) -> None:
        steered = replace(self.last(), steer=as_written(self.c.steer))
        require(bool(steered.steer), "nothing is steered; /steer something first")
        self.line(f"--- plain, seed {steered.seed}")
        self.show(replace(steered, steer=()))
        self.line(f"--- {' '.join(steered.steer)}, seed {steered.seed}")
        self.show(steered)

    def explain(self, text: str) -> None:
        why = self.chat.explain(self.last(), text, self.kept[-1]["ids"])
        self.line("\n".join(explained(why, self.c.top_features)))

    # settings

    def steer(self, text: str) -> None:
        edits = text.split()
        self.chat.watched("steer").steer(*edits)  # raises UserError for an impossible edit
        self.change((*self.c.steer, *edits))

    def change(self, steer: tuple[str, ...]) -> None:
        if steer != self.c.steer:
            self.before.append(self.c.steer)
        self.c = replace(self.c, steer=steer)
        self.line(f"edits: {' '.join(steer) or 'none'}")

    def undo(self, _: str) -> None:
        require(bool(self.before), "there is nothing to take back")
        self.c = replace(self.c, steer=self.before.pop())
        self.change(self.c.steer)

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

    def color(self, text: str) -> None:
        self.shade = self.chat.feature(*self.latent(text)) if text else None

    colour = color

    # features

    def latent(self, text: str) -> tuple[str, int]:
        """`12` or `HOOKPOINT/12` -> the SAE's name and the latent."""
        place, _, number = text.rpartition("/")
        require(number.isdecimal() and len(number) < 12, f"'{text}' is not a feature; write its number")
        return self.chat.watched("look at features").name_of(place or None, int(number)), int(number)

    def feature(self, text: str) -> None:
        for line in described(self.chat, *self.latent(text)):
            self.line(printable(line))

    def search(self, text: str) -> None:
        require(bool(text), "say what to look for: /search docstring")
        for name, notes in self.chat.notes.items():
            for latent in notes.search(text):
                found = self.chat.feature(name, latent)
                self.line(named(found.hookpoint, latent, found.label))
        if not any(notes.labels for notes in self.chat.notes.values()):
            self.line("(no labels: python -m scripts.sae_viz --all_features makes some)")

    # keeping

    def save(self, text: str) -> None:
        from sae.files import write_json

        require(bool(text), "give the file to save to: /save talk.json")
        write_json({"model": self.chat.lm.name, "saes": list(self.chat.notes), "answers": self.kept}, Path(text))
        self.line(f"{len(self.kept)} answers saved to {text}")

    def replay(self, text: str) -> None:
        kept = read_json(text)
        answers = kept.get("answers") if isinstance(kept, dict) else None
        require(isinstance(answers, list), f"'{text}' is no saved conversation; /save writes one")
        self.new("")
        for one in answers or ():
            ask = from_json(one.get("ask"))
            edits = f"   [{' '.join(ask.steer)}]" if ask.steer else ""
            self.line(f"> {printable(ask.messages[-1]['content'])}{edits}")
            same = self.answer(ask) == one.get("ids")
            self.line("(the same answer)" if same else "(another answer than the saved one)")


def from_json(value: Any) -> Ask:
    """A kept question. Raises UserError for anything else."""
    require(isinstance(value, dict) and "messages" in value, "a kept answer lacks its question; save it again")
    return build(Ask, value)


def described(chat: Conversation, name: str, latent: int) -> list[str]:
    """What is known of a feature, in a few lines."""
    record = chat.notes[name].record(latent)
    lines = [f"feature {latent} of {name}: {record.get('label') or 'no label'}"]
    if record:
        lines.append(f"  active on {100 * record['density']:.3g}% of tokens, at most {record['max_activation']:.4g}")
    for what, tokens in zip(("promotes", "suppresses"), chat.tokens_of(name, latent), strict=True):
        lines += [f"  {what:10} " + "  ".join(map(repr, tokens))] if tokens else []
    for context in record.get("contexts", [])[:3]:
        tokens = [f"[{t}]" if v > 0 else t for t, v in zip(context["tokens"], context["values"], strict=True)]
        lines.append("  " + "".join(tokens).replace("\n", "\\n"))
    return lines


def main(argv: list[str]) -> None:
    c = from_cli(ChatConfig, argv, prog="python -m scripts.chat", description=__doc__)
    if c.web:
        from sae.chat.server import serve
    chat = open_conversation(c)
    if c.prompt is not None:
        answer_once(c, chat)
    elif c.web:
        log.say(f"{chat.lm.name}, {', '.join(chat.notes) or 'no SAE'}")
        serve(chat, question(c, user("")), host=c.host, port=c.port, max_waiting=c.max_waiting)
    else:
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # input() then has a history
        Terminal(c, chat).run()


if __name__ == "__main__":
    log.run_script(main)
