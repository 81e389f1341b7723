"""Talking in the terminal: features beside every token, edits, seeds, what is kept and answered again.

Run: python -m pytest tests/chat/test_conversation.py
"""

import dataclasses
import io
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from sae import hooks
from sae.chat.conversation import Ask, Conversation, Notes
from sae.config import ChatConfig, UserError
from sae.formats.store import save_sae
from scripts import chat
from tests.conftest import HOOK, ROOT
from tests.test_runtime import an_sae, logits, prompt_ids

QUESTION = "What does alpha beta do?"
SEED = 1  # of an answer that no special token ends early


def record(latent, label, most=4.0):
    context = {"tokens": ["alpha", " beta\x1b"], "values": [0.0, most], "peak": 1, "sequence": 0, "position": 3}
    return {
        "latent": latent,
        "n_tokens": 100,
        "density": 0.01,
        "max_activation": most,
        "mean_active": 1.0,
        "label": label,
        "promoted": [],
        "suppressed": [],
        "contexts": [context],
    }


@pytest.fixture(scope="module")
def run(gpt_path, tmp_path_factory):
    """A run's folder: an SAE of the tiny GPT, with notes on its features."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    sae = an_sae(seed=2)
    sae.W_dec *= 3
    save_sae(sae, folder, hookpoint=HOOK, model_name=gpt_path)
    (folder / "features").mkdir()
    lines = [record(i, f"word {i}" if i % 2 else "") for i in range(96)]
    lines[7]["label"] = "inside a <docstring>\x1b[31m"
    (folder / "features" / "features.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return folder


@pytest.fixture(scope="module")
def talk(run):
    return chat.open_conversation(ChatConfig(sae_path=str(run)))


def ask(text=QUESTION, **fields):
    return Ask(({"role": "user", "content": text},), **{"max_new_tokens": 12, "seed": SEED, **fields})


def batch(capsys, run, *flags):
    chat.main(["--sae_path", str(run), "--prompt", QUESTION, "--max_new_tokens", "12", *flags])
    return capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# the language model writes


def test_generate_is_the_models_own(lm):
    """Past a full context too; but a vocabulary that is padded beyond the tokenizer's is not drawn from."""
    ids = prompt_ids(lm, "alpha beta", "gamma beta")
    assert int(torch.cat(list(lm.generate(ids, 300)), 1).max()) < lm.tokenizer.vocab_size < lm.module.config.vocab_size
    lm = dataclasses.replace(lm, tokenizer=types.SimpleNamespace(vocab_size=320))
    for options in ({"temperature": 0}, {"temperature": 0.9, "top_k": 9}, {"temperature": 1.3}):
        g = lambda: torch.Generator().manual_seed(5)
        ours = torch.cat(list(lm.generate(ids, 80, generator=g(), **options)), 1)
        theirs = torch.cat(list(lm.module.generate(ids, 80, generator=g(), **options)), 1)
        assert torch.equal(ours, theirs)
    uncached = dataclasses.replace(lm, step_fn=None)
    greedy = lambda model: torch.cat(list(model.generate(ids, 80, temperature=0)), 1)
    assert torch.equal(greedy(lm), greedy(uncached))


def test_the_prompt_is_a_chat_where_the_model_knows_one(talk):
    tokenizer = talk.lm.tokenizer
    assert talk.ids_of(ask()) == tokenizer.render_chat([{"role": "user", "content": QUESTION}], reply=True)
    assert talk.ids_of(ask(raw=True)) == tokenizer.encode_document(QUESTION)
    with pytest.raises(UserError, match="no chat message"):
        talk.ids_of(Ask(({"role": "fool", "content": "hi"},)))


# ----------------------------------------------------------------------------------------------------------------------
# a conversation


def test_every_token_has_its_own_features(talk):
    """Those of the state that holds the token, the answer's last one included."""
    question = ask(top_features=4)
    tokens = list(talk.stream(question))
    prompt, answer = [t for t in tokens if t.prompt], [t for t in tokens if not t.prompt]
    assert [t.id for t in prompt] == talk.ids_of(question)
    assert len(answer) == 12
    ids = torch.tensor([[t.id for t in tokens]])
    want = talk.live.saes[HOOK].encode(talk.lm.hidden(ids, torch.ones_like(ids, dtype=torch.bool), [HOOK])[HOOK])[0]
    for token, row in zip(tokens, want, strict=True):
        best = row.topk(4)
        assert [f.latent for f in token.features] == best.indices[best.values > 0].tolist()
        torch.testing.assert_close([f.activation for f in token.features], best.values[best.values > 0].tolist())
        assert all(f.label == talk.notes[HOOK].labels.get(f.latent, "") for f in token.features)
        assert token.text == talk.lm.tokenizer.token_str(token.id)
    plain = [t.id for t in talk.stream(ask(sae=False))]
    assert plain == [t.id for t in tokens]


def test_answers_written_in_turn_do_not_mix(talk):
    questions = [ask(seed=1), ask(seed=1, steer=("3:+9",)), ask("gamma", seed=2, steer=("5:+7@generated", "9:=3"))]
    alone = [list(talk.stream(q)) for q in questions]
    streams, turned = [talk.stream(q) for q in questions], [[], [], []]
    for _ in range(max(map(len, alone))):
        for stream, found in zip(streams, turned, strict=True):
            found += [t for t in [next(stream, None)] if t is not None]
    assert turned == alone
    assert alone[0] != alone[1]


def test_a_condition_ends_an_answer(talk):
    answer = [t for t in talk.stream(ask(top_features=100)) if not t.prompt]
    latent, most = max(((f.latent, f.activation) for t in answer[2:] for f in t.features), key=lambda f: f[1])
    first = next(
        i for i, t in enumerate(answer) if any(f.latent == latent and f.activation > most - 1e-3 for f in t.features)
    )
    stopped = [t for t in talk.stream(ask(top_features=100, stop=(f"{latent}>{most - 1e-3}",))) if not t.prompt]
    assert stopped == answer[: first + 1]


def test_explanations_add_up_to_the_logit(talk, gpt_path):
    """At the last block every part of the stream goes straight to the logits: nothing may be lost or counted twice."""
    hook = "transformer.h.2"
    lm, sae = talk.lm, an_sae(seed=6)
    alone = Conversation(lm, {hook: sae}, {hook: Notes(Path(), 96)})
    question = ask(steer=("4:+2",), seed=3)
    answer = [t.id for t in alone.stream(question) if not t.prompt]
    wanted = next(i for i in answer[1:] if lm.tokenizer.encode(lm.tokenizer.token_str(i)) == [i])
    why = alone.explain(question, lm.tokenizer.token_str(wanted), answer)
    place = answer.index(wanted)
    assert (why["id"], why["position"], why["note"]) == (wanted, place, "")
    ids = torch.tensor([[*alone.ids_of(question), *answer[:place]]])
    with alone.live.steer("4:+2"), hooks.capture(lm.module, [hook]) as held:
        out = logits(lm, ids)[0, -1]
    assert why["logit"] == pytest.approx(float(out[wanted] - out.mean()), abs=1e-4)
    assert why["probability"] == pytest.approx(float(out.softmax(-1)[wanted]), abs=1e-6)
    x = held[hook][0, -1]
    codes = sae.encode(x)
    assert {f["latent"] for f in why["features"]} == set(codes.nonzero()[:, 0].tolist())
    norm, U = lm.module.transformer.ln_f, lm.module.lm_head.weight
    for f in why["features"]:  # the logit with and without the feature, the norm's scale held
        part = f["activation"] * sae.W_dec[f["latent"]]
        scale = (x.var(correction=0) + norm.eps).sqrt()
        moved = ((part - part.mean()) / scale * norm.weight) @ U.t()
        assert f["effect"] == pytest.approx(float(moved[wanted] - moved.mean()), abs=1e-4)
    rest = x - codes @ sae.W_dec
    left = ((rest - rest.mean()) / scale * norm.weight + norm.bias) @ U.t()
    assert why["rest"] == pytest.approx(float(left[wanted] - left.mean()), abs=1e-3)
    absent = next(i for i in range(lm.tokenizer.vocab_size) if i not in answer and i not in lm.tokenizer.special_ids)
    several = lm.tokenizer.token_str(absent) + "zqzq"
    note = alone.explain(question, several, [i for i in answer if i not in lm.tokenizer.encode(several)])["note"]
    assert "is several tokens; this is about the first of them" in note and "is not in the answer" in note
    with pytest.raises(UserError, match="empty"):
        alone.explain(question, "")


def test_notes(run, tmp_path):
    notes = Notes(run / "features", 96)
    assert notes.labels[1] == "word 1" and 2 not in notes.labels
    assert notes.record(7)["label"].startswith("inside a <docstring>")
    assert notes.record(95)["latent"] == 95
    assert notes.search("docstring inside") == [7]
    assert notes.search("\u00b2") == notes.search("9" * 5000) == []
    assert notes.search("11") == [11]  # its number, and no label has it twice
    notes.labels[20] = "`x` or 11 more"
    assert notes.search("11") == [11] and notes.search("`x`") == [20]  # how many more is no word of the label
    assert Notes(tmp_path, 4).record(2) == {}
    bad = tmp_path / "features.jsonl"
    for text in ("{", '{"a":1}', '{"latent":96}', "[]", '{"latent":"x"}'):
        bad.write_text(text + "\n")
        with pytest.raises(UserError, match="no feature"):
            Notes(tmp_path, 96)


# ----------------------------------------------------------------------------------------------------------------------
# one answer


def test_one_json_object(run, talk, capsys):
    flags = ("--json", "--seed", "1", "--top_features", "5", "--steer", "12:+8", "--steer", "45:=4", "6:*0")
    found = json.loads(batch(capsys, run, *flags))
    assert list(found) == ["prompt", "answer", "tokens", "steer"]
    assert found["prompt"] == QUESTION
    assert found["steer"] == ["12:+8", "45:=4", "6:*0"]
    assert found["answer"] == talk.lm.tokenizer.decode([t["id"] for t in found["tokens"]])
    for token in found["tokens"]:
        assert set(token) == {"id", "text", "features"}
        assert 0 < len(token["features"]) <= 5
        assert all(set(f) == {"latent", "activation", "label"} for f in token["features"])
    assert json.loads(batch(capsys, run, *flags)) == found
    assert json.loads(batch(capsys, run, "--json", "--seed", "1"))["answer"] != found["answer"]
    plain = json.loads(batch(capsys, run, "--json", "--seed", "1", "--no_sae", "--model", talk.lm.name))
    assert plain["answer"] == json.loads(batch(capsys, run, "--json", "--seed", "1", "--steer", "3:+0"))["answer"]
    assert all(t["features"] == [] for t in plain["tokens"])
    why = json.loads(batch(capsys, run, "--json", "--seed", "1", "--explain", "sigma"))["explain"]
    assert why["token"] == "sigma" and why["features"]


def test_one_answer_as_text(run, capsys):
    out = batch(capsys, run, "--explain", "sigma")
    assert "'sigma' at token" in out and "all else" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--json"], "--prompt"),
        (["--prompt", "x", "--steer", "12:8"], "not a valid edit"),
        (["--prompt", "x", "--steer", "96:+8"], "0 to 95"),
        (["--prompt", "x", "--stop_when", "3"], "not a valid condition"),
        (["--prompt", "x", "--no_sae", "--steer", "1:+2"], "drop --no_sae"),
        (["--prompt", "x", "--port", "9"], "--port goes with --web"),
        (["--prompt", "x", "--explain", ""], "the token to explain is empty; give one, such as --explain"),
        (["--prompt", "x", "--web"], "exclude"),
        (["--prompt", "x", "--temperature", "-1"], "at least 0"),
        (["--sae_path", "nowhere", "--prompt", "x"], "does not exist"),
    ],
)
def test_what_cannot_be_is_one_sentence(run, flags, says):
    with pytest.raises(UserError, match=says):
        chat.main(["--sae_path", str(run), *flags])


def test_a_real_process(run, tmp_path):
    command = [sys.executable, "-m", "scripts.chat", "--sae_path", str(run), "--max_new_tokens", "6"]
    lines = "alpha beta\n/steer 3:+9\n/compare\n/nonsense\n/quit\n"
    done = subprocess.run(command, cwd=ROOT, input=lines, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--- plain" in done.stdout and "--- 3:+9" in done.stdout and "no command /nonsense" in done.stdout
    bad = subprocess.run([*command, "--prompt", "x", "--steer", "3"], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and bad.stdout == ""


# ----------------------------------------------------------------------------------------------------------------------
# commands


@pytest.fixture
def terminal(run, talk):
    out = io.StringIO()
    one = chat.Terminal(ChatConfig(sae_path=str(run), max_new_tokens=8, seed=SEED), talk, out.write)

    def does(text):
        out.seek(0)
        out.truncate()
        one.take(text)
        return out.getvalue()

    one.does = does
    return one


def test_steering_undoing_comparing(terminal):
    plain = terminal.does("alpha beta")
    assert terminal.does("/steer 3:+9 5:*0") == "edits: 3:+9 5:*0\n"
    assert terminal.does("/steer 6:=1") == "edits: 3:+9 5:*0 6:=1\n"
    assert terminal.does("/undo") == "edits: 3:+9 5:*0\n"
    both = terminal.does("/compare")
    assert f"--- plain, seed {SEED}\n{plain}--- 3:+9 5:*0, seed {SEED}\n" in both
    assert both.rsplit("\n", 2)[1] != plain
    assert terminal.does("/clear") == "edits: none\n"
    assert terminal.does("/undo") == "edits: 3:+9 5:*0\n"
    terminal.does("/undo")
    terminal.does("/new")
    assert terminal.does("alpha beta") == plain
    for bad, says in (
        ("/undo", "nothing to take back"),
        ("/steer 3:9", "not a valid edit"),
        ("/steer 99:+1", "0 to 95"),
        ("/compare", "nothing is steered"),
    ):
        with pytest.raises(UserError, match=says):
            terminal.does(bad)
    assert terminal.c.steer == ()


def test_looking(terminal):
    assert "nothing was answered" in str(pytest.raises(UserError, terminal.does, "/explain sigma").value)
    terminal.does("/view")
    table = terminal.does("alpha beta").splitlines()
    assert len(table) == 8
    assert "word" in "".join(table)
    assert all(len(line) < 200 for line in table)
    assert "at token" in terminal.does("/explain sigma")
    for bad in ("/color \u00b2", "/feature 9999999999999", "/seed \u00b2", "/seed 9999999999999999999", "/search"):
        pytest.raises(UserError, terminal.does, bad)
    found = terminal.does("/feature 7")
    assert "inside a <docstring>\\x1b[31m" in found and "promotes" in found and "[ beta\\x1b]" in found
    assert "\x1b" not in found
    assert terminal.does("/search docstring").startswith("7 inside")
    assert "/replay" in terminal.does("/help")
    terminal.does("/view")
    terminal.does("/color 7")
    terminal.paints = True
    latent = max(terminal.largest, key=terminal.largest.get)[1]
    terminal.does(f"/color {latent}")
    assert "\x1b[48;2;" in terminal.does("alpha beta")
    terminal.does("/color")
    assert "\x1b" not in terminal.does("alpha beta")


def test_saving_and_replaying(terminal, tmp_path):
    terminal.does("alpha beta")
    terminal.does("/steer 3:+9")
    terminal.does("/seed 4")
    second = terminal.does("gamma delta")
    file = tmp_path / "talk.json"
    assert "2 answers saved" in terminal.does(f"/save {file}")
    terminal.does("/new")
    again = terminal.does(f"/replay {file}")
    assert again.count("(the same answer)") == 2
    assert f"> gamma delta   [3:+9]\n{second}" in again
    kept = json.loads(file.read_text())
    kept["answers"][0]["ids"][0] += 1
    file.write_text(json.dumps(kept))
    assert "(another answer than the saved one)" in terminal.does(f"/replay {file}")
    file.write_text('{"answers": [{"ask": {"messages": 3}}]}')
    with pytest.raises(UserError, match="list of dict"):
        terminal.does(f"/replay {file}")


def test_control_characters_do_not_reach_the_terminal():
    assert chat.printable("a\x1b[2J\x07b\n\u202e") == "a\\x1b[2J\\x07b\n\\u202e"
