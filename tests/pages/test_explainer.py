"""Explanations through a real server that speaks chat completions: what is asked, the scores, faults, resuming.

Run: python -m pytest tests/pages/test_explainer.py
"""

import json
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sae import log
from sae.config import UserError
from sae.pages import explainer
from sae.pages.explainer import Endpoint, Example, Explainer, accuracy, examples, marked, read_list, with_explanation
from sae.pages.records import Context, FeatureRecord, read_features
from scripts import sae_viz
from tests.test_feature_viz import run_folder as run_folder

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon"]


def feature(latent, n=40):
    """Fires on the word of its number, and on nothing else."""
    rng = random.Random(latent)
    contexts = []
    for i in range(n):
        tokens = [f" {rng.choice([w for w in WORDS if w != WORDS[latent]])}" for _ in range(11)]
        tokens[5] = f" {WORDS[latent]}"
        values = [0.0] * 5 + [2.0 - i / 100] + [0.0] * 5
        drawn = {"low": 0.0, "high": 2.0, "share": 1.0} if i >= 20 else {}
        contexts.append(Context(tokens, values, 5, 100 * latent + i, 5, **drawn))
    return FeatureRecord(latent, 1000, 0.1, 2.0, 1.0, contexts=contexts)


RECORDS = [feature(i) for i in range(5)]


class Model(ThreadingHTTPServer):
    """Answers as a perfect explainer of `feature`, unless `faults` has something else in store: a status, a body, or
    "hang up"."""

    def __init__(self):
        self.asked, self.faults, self.keys = [], [], []
        super().__init__(("127.0.0.1", 0), Handler)

    def answer(self, system, user):
        if "[EXPLANATION]" in system:
            return f"Some thoughts.\n[EXPLANATION]: the word {re.findall('<<(.*?)>>', user)[0].strip()}"
        word = re.search("the word (\\w+)", system)[1]
        texts = [line.split(": ", 1)[1] for line in user.split("\n")]
        judge = (lambda t: set(re.findall("<<(.*?)>>", t)) == {f" {word}"}) if "<<" in system else lambda t: word in t
        return json.dumps([int(judge(t)) for t in texts])


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.keys.append(self.headers.get("Authorization"))
        fault = server.faults.pop(0) if server.faults else None
        if fault == "hang up":
            self.close_connection = True
            return
        status, text = fault if isinstance(fault, tuple) else (fault or 200, None)
        if status == 200 and text is None:
            system, user = (m["content"] for m in body["messages"])
            server.asked.append((self.path, body["model"], system, user))
            text = json.dumps({"choices": [{"message": {"content": server.answer(system, user)}}]})
        data = (text or "{}").encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(explainer, "WAIT_S", 0.01)
    with Model() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.url = f"http://127.0.0.1:{server.server_port}/v1"
        yield server
        server.shutdown()


def test_a_right_explanation_scores_1(model, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOSAE_API_KEY", "secret-key")
    asked = Explainer(Endpoint(model.url, "tiny"), tmp_path / "journal.jsonl")
    cost = asked.estimate(RECORDS, RECORDS)
    found = asked.run(RECORDS, RECORDS)
    for r in RECORDS:
        assert found[r.latent].text == f"the word {WORDS[r.latent]}"
        assert found[r.latent].detection == pytest.approx(0.5, abs=0.5)
        assert found[r.latent].fuzzing == 1.0
        assert with_explanation(r, found[r.latent]).explanation == found[r.latent].text
    assert cost["questions"] == len(model.asked) == 5 * (1 + 4 + 4)
    chars = sum(len(system) + len(user) for *_, system, user in model.asked)
    assert cost["tokens_in"] == pytest.approx(chars / explainer.CHARS_PER_TOKEN, rel=0.1)
    assert {(path, name) for path, name, *_ in model.asked} == {("/v1/chat/completions", "tiny")}
    assert set(model.keys) == {"Bearer secret-key"}
    assert "secret" not in (tmp_path / "journal.jsonl").read_text()
    assert with_explanation(RECORDS[0], None) == RECORDS[0]


def test_a_wrong_explanation_scores_by_chance(model, tmp_path):
    model.answer = lambda system, user: (
        "[EXPLANATION]: rubbish" if "[EXPLANATION]" in system else json.dumps([1] * len(user.split("\n")))
    )
    found = Explainer(Endpoint(model.url, "tiny"), tmp_path / "j").run(RECORDS[:1], RECORDS)
    assert (found[0].detection, found[0].fuzzing) == (0.5, 0.5)
    model.answer = lambda *_: "I would rather not say."
    found = Explainer(Endpoint(model.url, "other"), tmp_path / "j").run(RECORDS[:1], RECORDS)
    assert (found[0].text, found[0].detection, found[0].fuzzing) == ("I would rather not say.", 0.0, 0.0)


@pytest.mark.parametrize("kind", ["detection", "fuzzing"])
def test_examples_are_half_true_and_unread(kind):
    r = RECORDS[2]
    found = examples(r, RECORDS, kind)
    assert found == examples(r, RECORDS, kind)
    assert sum(e.true for e in found) == len(found) / 2 == 10
    read = {marked(c, ()) for c in r.strongest[: explainer.N_READ]}
    own = {marked(c, ()) for c in r.contexts}
    for e in found:
        bare = e.text.replace("<<", "").replace(">>", "")
        assert bare not in read
        assert (bare in own) == e.true
        assert ("<< gamma>>" in e.text) == (e.true and kind == "fuzzing")
        assert e.text.count("<<") == (kind == "fuzzing")


def test_marks_join_and_lines_stay_lines():
    c = Context(["a", "\n", "b", "c"], [1.0, 0.0, 1.0, 2.0], 3, 0, 0)
    assert marked(c) == "<<a>>\\n<<bc>>"
    assert marked(c, ()) == "a\\nbc"


def test_accuracy_and_answers():
    found = [Example("", True)] * 3 + [Example("", False)]
    assert accuracy(found, [1, 1, 0, 0]) == pytest.approx((2 / 3 + 1) / 2)
    assert accuracy(found, [1, None, 1, None]) == pytest.approx((2 / 3 + 0) / 2)
    assert accuracy(found[:3], [1, 1, 1]) is None
    assert read_list("Sure: [1, 0,1]", 3) == [1, 0, 1]
    assert (
        read_list("[1, 0]", 3) == read_list("no", 3) == read_list("[2,0,1]", 3) == read_list("[1,,0]", 3) == [None] * 3
    )


def test_a_busy_server_is_asked_again(model, tmp_path):
    model.faults = [429, 500, "hang up", 503]
    found = Explainer(Endpoint(model.url, "tiny"), tmp_path / "j").run(RECORDS[:1], RECORDS)
    assert found[0].fuzzing == 1.0
    model.faults = [500] * 5
    with pytest.raises(UserError, match="no answer in 5 tries"):
        Explainer(Endpoint(model.url, "tiny"), tmp_path / "k").run(RECORDS[:1], RECORDS)


@pytest.mark.parametrize(
    ("fault", "says"),
    [(401, "refused with status 401"), ((200, "<html>"), "does not speak"), ((200, "[]"), "does not speak")],
)
def test_a_server_that_refuses_is_named(model, tmp_path, fault, says):
    model.faults = [fault]
    with pytest.raises(UserError, match=says):
        Explainer(Endpoint(model.url, "tiny"), tmp_path / "j").run(RECORDS[:1], RECORDS)


def test_a_run_that_was_cut_off_goes_on(model, tmp_path):
    journal = tmp_path / "deep" / "journal.jsonl"
    model.faults = [None] * 20 + [400]  # in the third feature
    with pytest.raises(UserError, match="400"):
        Explainer(Endpoint(model.url, "tiny"), journal).run(RECORDS, RECORDS)
    with journal.open("a") as f:
        f.write('{"latent": 2, "text": "half a li')
    again = Explainer(Endpoint(model.url, "tiny"), journal)
    assert sorted(again.done) == [0, 1]
    n = len(model.asked)  # two features, and two questions of the third
    assert again.estimate(RECORDS, RECORDS)["questions"] == 27
    assert sorted(again.run(RECORDS, RECORDS)) == [0, 1, 2, 3, 4]
    assert len(model.asked) == n + 27
    last = Explainer(Endpoint(model.url, "tiny"), journal)
    assert last.run(RECORDS, RECORDS) == again.done
    assert len(model.asked) == n + 27
    assert Explainer(Endpoint(model.url, "another"), journal).done == {}


def test_the_script_explains(model, run_folder, capsys):
    model.answer = lambda system, _: "[EXPLANATION]: something" if "[EXPL" in system else "[]"
    flags = ["--sae_path", run_folder, "--eval_tokens", 300, "--device", "cpu", "--explainer_url", model.url]
    run = lambda *more: log.run_script(sae_viz.main, [str(f) for f in (*flags, *more)])
    run("--explainer_model", "tiny", "--explainer_limit", 3)
    assert "asking tiny" in capsys.readouterr().out
    records = list(read_features(run_folder / "features" / "features.jsonl"))
    assert [r.explanation for r in records[:4]] == ["something", "something", "something", ""]
    assert {(r.explainer, r.fuzzing) for r in records[:3]} <= {("tiny", 0.0), ("tiny", None)}
    with pytest.raises(SystemExit) as e:
        run()
    assert e.value.code == 2
    assert "go together" in capsys.readouterr().err
