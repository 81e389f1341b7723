"""A feature is found by what it means, turned up, and what the model writes changes:

    python -m benchmarks.steering [--sae_path sae_models/layer_10] [--what comment]

Python's own tokenizer says which tokens of held-out code lie inside a comment (or docstring). The latent that says so
best (by F1) is steered while the model goes on with the beginnings of functions; for each strength, how much of what
it writes Python's tokenizer then takes for a comment. Same seeds with and without.
Writes benchmarks/results/steering.json.
"""

from __future__ import annotations

import argparse
import io
import json
import tokenize
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import about
from sae import log
from sae.chat.conversation import Ask, Conversation
from sae.config import ChatConfig
from sae.data.datasets import open_dataset
from scripts.chat import open_conversation

RESULTS = Path(__file__).resolve().parent / "results" / "steering.json"
STARTS = (
    "def read_lines(path):",
    "class Stack:\n    def push(self, item):",
    "import os\n\ndef main(argv):",
    "def is_prime(n):",
    "class Parser:\n    def __init__(self, text):",
    "def copy_tree(source, target):",
)
SHOWN = 0  # which of them the README shows
STRENGTHS = (0.0, 0.5, 1.0, 1.5)  # of the feature's largest activation in the text it was found in


def inside(text: str, what: str) -> list[bool]:
    """For every character of Python text, whether it lies in a comment, or in a docstring."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = [False] * len(text)
    kind, before = tokenize.COMMENT if what == "comment" else tokenize.STRING, tokenize.NEWLINE
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            opens = before in (tokenize.NEWLINE, tokenize.INDENT, tokenize.NL) and token.string[:1] in "\"'ru"
            if token.type == kind and (what == "comment" or opens):
                begin, end = (starts[row - 1] + column for row, column in (token.start, token.end))
                found[begin:end] = [True] * (end - begin)
            before = token.type
    except (tokenize.TokenError, SyntaxError):
        pass  # text that ends in the middle: what was found counts
    return found


def marks(chat: Conversation, ids: list[int], what: str) -> list[bool]:
    """The same for every token, by its first character."""
    pieces = [chat.lm.tokenizer.token_str(i) for i in ids]
    places, at = inside("".join(pieces), what), 0
    found = []
    for piece in pieces:
        found.append(at < len(places) and places[min(at + (len(piece) > 1), len(places) - 1)])
        at += len(piece)
    return found


@torch.no_grad()
def find(chat: Conversation, name: str, what: str, n_tokens: int = 60_000) -> dict[str, Any]:
    """The latent that is active where tokens lie inside, and elsewhere not."""
    assert chat.live is not None
    lm, sae = chat.lm, chat.live.saes[name]
    hits, fired, largest = (torch.zeros(sae.d_sae) for _ in range(3))
    n_inside = n = 0
    bar = log.progress(n_tokens, "looking for the latent")
    for text in open_dataset(None).documents("val"):
        if n >= n_tokens:
            break
        if not isinstance(text, str):
            continue
        ids = lm.tokenizer.encode(text)
        mask = torch.tensor(marks(chat, ids, what))
        for part, where in zip(torch.tensor(ids).split(lm.max_len), mask.split(lm.max_len), strict=True):
            if len(part) < 2:
                continue
            valid = torch.ones(1, len(part), dtype=torch.bool)
            f = sae.encode(lm.hidden(part[None], valid, [name])[name][0])
            hits += (f[where] > 0).sum(0)
            fired += (f > 0).sum(0)
            largest = torch.maximum(largest, f.amax(0))
            n_inside, n = n_inside + int(where.sum()), n + len(part)
            bar.update(min(len(part), n_tokens - bar.n))
    bar.close()
    f1 = 2 * hits / (fired + n_inside)
    best = int(f1.argmax())
    return {
        "latent": best,
        "f1": float(f1[best]),
        "precision": float(hits[best] / fired[best]),
        "recall": float(hits[best] / n_inside),
        "share_of_text": n_inside / n,
        "n_tokens": n,
        "largest_activation": float(largest[best]),
        "label": chat.notes[name].labels.get(best, ""),
    }


def write(chat: Conversation, start: str, steer: tuple[str, ...], seed: int, n: int) -> list[int]:
    ask = Ask(({"role": "user", "content": start},), raw=True, seed=seed, max_new_tokens=n, steer=steer)
    return [token.id for token in chat.stream(ask) if not token.prompt]


def share(chat: Conversation, start: str, ids: list[int], what: str) -> float:
    """How much of a continuation lies inside."""
    before = chat.lm.tokenizer.encode(start)
    found = marks(chat, [*before, *ids], what)[len(before) :]
    return sum(found) / max(1, len(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae_path", help="a run (default: the newest)")
    parser.add_argument("--what", choices=("comment", "docstring"), default="comment")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    chat = open_conversation(ChatConfig(sae_path=args.sae_path))
    name = next(iter(chat.notes))
    feature = find(chat, name, args.what)
    print(json.dumps(feature, indent=1))
    rows: list[dict[str, Any]] = []
    for strength in STRENGTHS:
        edit = f"{feature['latent']}:+{strength * feature['largest_activation']:.1f}"
        steer = (edit,) if strength else ()
        jobs = [(s, seed) for s in STARTS for seed in range(args.seeds)]
        with log.progress(len(jobs), edit if steer else "plain", unit="text") as bar:
            written = []
            for s, seed in jobs:
                written.append((s, seed, write(chat, s, steer, seed, args.tokens)))
                bar.update()
        shares = [share(chat, s, ids, args.what) for s, _, ids in written]
        texts = [chat.lm.tokenizer.decode(ids) for _, _, ids in written]
        examples = [{"start": s, "seed": 0, "text": texts[i * args.seeds]} for i, s in enumerate(STARTS)]
        rows.append({"strength": strength, "steer": steer, "share": sum(shares) / len(shares), "examples": examples})
        print(f"{edit if steer else 'plain':>12}: {100 * rows[-1]['share']:.0f}% inside a {args.what}")
        print(rows[-1]["examples"][0]["text"])
    of = {"model": chat.lm.name, "hookpoint": name, "texts": len(STARTS) * args.seeds, "tokens": args.tokens}
    result = {"what": args.what, "feature": feature, "rows": rows, "shown": SHOWN, "about": about() | of}
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
