"""Publishing: every rule is checked before anything is sent, and whatever happens on the way, all is there once.

Run: python -m pytest tests/test_neuronpedia.py
"""

import copy
import itertools
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import numpy as np
import pytest

from sae import NeuronpediaClient, SAEConfig, create_sae, neuronpedia
from sae.config import UserError
from sae.formats import store
from sae.neuronpedia import Journal, Rejected, Unsure
from sae.pages import neuronpedia_format as form
from scripts import sae_upload
from tests.conftest import call
from tests.fake_neuronpedia import KEY, OPAQUE, Answer, Fault, Neuronpedia, import_tree

MODEL, SET, SOURCE = "tiny", "mine", "1-mine"
WORDS = ["def", " f", "(x", "\n    ", "", "\0", "\ud83d", "\u05d0", "\U0001f600", "</script>", '"', "\\u0000", "\\"]
SIGNS = {"": "\u2205", "\0": "\u2400", "\ud83d": "\ufffd"}


def record(i, n_contexts=3, n_tokens=6):
    """A feature as features.jsonl has it; the last context was drawn from an interval."""
    rng = random.Random(i)
    words = lambda n: [rng.choice(WORDS) for _ in range(n)]
    values = lambda n: [round(rng.random() * 3, 4) for _ in range(n)]
    contexts = [
        {"tokens": words(n_tokens), "values": values(n_tokens), "peak": 0, "sequence": c, "position": 0}
        for c in range(n_contexts)
    ]
    if contexts:
        contexts[-1] |= {"low": 0.5, "high": 1.25, "share": 0.125}
    pairs = lambda: [[w, v] for w, v in zip(words(10), values(10), strict=True)]
    return {
        "latent": i,
        "n_tokens": 1000,
        "density": 0.25 if contexts else 0.0,
        "max_activation": 3.0,
        "mean_active": 1.0,
        "label": f"number {i}",
        "label_precision": 0.75,
        "label_recall": 0.5,
        "promoted": pairs(),
        "suppressed": pairs(),
        "neighbours": [[i + 1, 0.5]],
        "cofiring": [[i + 2, 0.25]],
        "typical": [["x", 1.0]],
        "first": [],
        "positions": [],
        "histogram": {"edges": [0.0, 1.0, 2.0], "counts": [5, 7]},
        "contexts": contexts,
    }


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    """No test waits a minute for a server that is asked in vain."""
    monkeypatch.setattr(neuronpedia, "SETTLE_S", 0.3)
    monkeypatch.setattr(neuronpedia, "BACKOFF_S", 0.002)
    monkeypatch.setattr(neuronpedia, "LIMIT_WAIT_S", 0.002)
    monkeypatch.setenv("NEURONPEDIA_API_KEY", KEY)


def flags(path, server, *more):
    names = ["--model_id", MODEL, "--set_name", SET, "--layer", 1, "--model_layers", 3]
    return ["--features", path, *names, "--api_base", server.api_base, *more]


def uploads(server):
    return sum(path == "feature/upload-batch" for _, path, _ in server.requests)


def assert_all_there_once(server, records):
    """Each feature once, each activation once, each label once, with what they hold."""
    alive = [form.to_feature(r) for r in records if r["contexts"]]
    key = lambda f: (MODEL, SOURCE, str(f["index"]))
    assert server.neurons.keys() == {key(f) for f in alive}
    as_sent = lambda k, a: (k, json.dumps(a, sort_keys=True))
    there = Counter(as_sent(k, a) for k, a in server.activations)
    assert there == Counter(as_sent(key(f), a) for f in alive for a in f["activations"])
    assert sorted(server.explanations) == sorted((key(f), e["text"]) for f in alive for e in f["explanations"])


# --------------------------------------------------------------------------------------------------
# rules


def test_a_record_becomes_what_the_server_takes():
    r = record(7)
    r["contexts"][0]["tokens"] = ["a", "", "\0b", "\ud83d", "\U0001f600", "\u05d0"]
    feature = form.to_feature(r)
    assert feature["index"] == 7
    assert feature["density"] == 0.25
    assert feature["explanations"] == [{"text": "number 7 (precision 0.75, recall 0.50)"}]  # a weak label says so
    assert feature["activations"][0] == {
        "tokens": ["a", "\u2205", "\u2400b", "\ufffd", "\U0001f600", "\u05d0"],
        "values": r["contexts"][0]["values"],
    }
    assert "quantileMin" not in feature["activations"][1]
    last = feature["activations"][-1]
    assert (last["quantileMin"], last["quantileMax"], last["quantileFraction"]) == (0.5, 1.25, 0.125)
    token, value = r["promoted"][0]
    assert feature["topLogits"][0] == {"token": SIGNS.get(token, token), "value": value}
    few = form.to_feature({"latent": 3, "contexts": [{"tokens": ["x"], "values": [1]}]})  # what cannot be left out
    assert few == {"index": 3, "topLogits": [], "bottomLogits": [], "activations": [{"tokens": ["x"], "values": [1]}]}


def changed(path, value):
    """A good record with one thing changed: path goes into it."""
    r = copy.deepcopy(record(1))
    *inner, last = path
    at = r
    for key in inner:
        at = at[key]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return r


NOT_NUMBERS = ["1", None, True, [1], float("nan"), float("inf"), -float("inf")]
FIRST = ("contexts", 0)
BROKEN = [
    *[(("latent",), v, "latent") for v in [-1, 10_000_001, 1.5, "1", None, True, float("nan"), ...]],
    *[(("density",), v, "density") for v in [-0.01, 1.01, "0", True, [0], float("nan"), float("inf")]],
    *[((name,), v, name) for name in ("promoted", "suppressed") for v in ["ab", 5, {"a": 1}, [["a"]], ["ab", 3], [3]]],
    *[((name, 0, 1), v, f"{name}[0]'s value") for name in ("promoted", "suppressed") for v in NOT_NUMBERS],
    *[((name, 1, 0), v, f"{name}[1]'s token") for name in ("promoted", "suppressed") for v in [None, 5, ["a"]]],
    *[(("label",), v, "label") for v in ["x" * 513, "x" * 500, 5, ["a"], True]],
    *[((name,), v, name) for name in ("label_precision", "label_recall") for v in [-0.1, 1.1, "1", float("nan")]],
    *[(("contexts",), v, "contexts") for v in [..., None, "ab", {}, 3]],
    *[(FIRST, v, "context 0") for v in [None, "ab", 3, [["a"], [1]]]],
    *[((*FIRST, "tokens"), v, "tokens") for v in [..., None, [], "abcdef", ["a"] * 5, ["a"] * 1025, ["a"] * 7]],
    *[((*FIRST, "tokens", 2), v, "token 2") for v in [None, 5, ["a"], True]],
    *[((*FIRST, "values"), v, "values") for v in [..., None, "123456", [], [1.0] * 5, [1.0] * 7, 3]],
    *[((*FIRST, "values", 2), v, "value 2") for v in NOT_NUMBERS],
    *[(("contexts", 2, name), v, name) for name in ("low", "high") for v in [100_000_000, "1", float("nan"), True]],
    *[(("contexts", 2, "share"), v, "share") for v in [-0.1, 1.1, "1", float("nan")]],
]


def test_malformed_records_are_refused_here_with_the_rule_named(tmp_path, capsys):
    assert len(BROKEN) >= 100
    records = []
    for n, (path, value, rule) in enumerate(BROKEN):
        broken = changed(path, value)
        with pytest.raises(UserError) as e:
            form.to_feature(broken)
        assert rule in str(e.value), (path, value, str(e.value))
        assert "wanted" in str(e.value)
        records += [{**broken, "latent": n + 1000} if path != ("latent",) else broken, record(n)]
    with Neuronpedia() as server:
        path = write(tmp_path / "features.jsonl", records)
        for more in ([], ["--dry_run"], ["--upload"], ["--export", tmp_path / "tree"]):
            assert call(sae_upload, *flags(path, server, *more)) == 2
            told = capsys.readouterr()
            assert f"{len(BROKEN)} of {len(records)} records" in told.err.replace(",", "")
            assert told.out.count("wanted") == 100  # as many are named
        assert server.requests == []
    assert not (tmp_path / "tree").exists()


def test_the_server_here_refuses_what_the_rules_forbid(tmp_path):
    """The fake is strict by itself: what our checks would let pass if they were gone does not get in."""
    with Neuronpedia() as server:
        client = NeuronpediaClient(KEY, api_base=server.api_base)
        client.create(MODEL, 3, SET)
        good = form.to_feature(record(1))

        def refused(body):
            try:
                server.upload_batch(json.loads(json.dumps(body)), "user1", lambda _: None)
            except Answer:
                return True
            return False

        send = lambda **change: refused({"modelId": MODEL, "source": SOURCE, "features": [{**good, **change}]})
        activation = lambda **change: send(activations=[{**good["activations"][0], **change}])
        assert send(index=-1)
        assert send(index=10_000_001)
        assert send(density=1.1)
        assert send(topLogits=[{"token": "", "value": 1}])
        assert send(topLogits=[{"token": "a", "value": 1}] * 21)
        assert send(explanations=[{"text": ""}])
        assert send(explanations=[{"text": "x" * 513}])
        assert send(activations=[])
        for tokens in (["", "b"], ["a\0", "b"], ["\ud83d", "b"], ["a"] * 3):
            assert activation(tokens=tokens, values=[1, 2]), tokens
        assert activation(tokens=["a"] * 1025, values=[1] * 1025)
        assert activation(tokens=["a"], values=["1"])
        assert activation(quantileFraction=1.5)
        assert refused({"modelId": MODEL, "source": SOURCE, "features": [good, good]})
        assert refused({"modelId": MODEL, "source": SOURCE, "features": [{**good, "index": i} for i in range(129)]})
        assert refused({"modelId": MODEL, "source": "9-mine", "features": [good]})
        assert refused({"modelId": MODEL, "source": "1-other", "features": [good]})
        assert not server.neurons
        assert not send()


@pytest.mark.parametrize(
    ("line", "words"),
    [("{", "line 2 is not json"), ("[1]", "line 2 is '[1]"), (None, "stands in the file twice"), ("\x00", "not json")],
)
def test_files_that_are_none(tmp_path, line, words, capsys):
    good = json.dumps(record(1))
    path = tmp_path / "features.jsonl"
    path.write_text(f"{good}\n{line or good}\n")
    with Neuronpedia() as server:
        assert call(sae_upload, *flags(path, server)) == 2
        told = capsys.readouterr()
        assert words in told.out + told.err
        assert call(sae_upload, *flags(tmp_path / "none.jsonl", server)) == 2
    assert "run sae_viz first" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a", "A-b", "a--b", "a..b", "1a", "a-", "x" * 33, "", "a b", "a/b"])
def test_names_that_the_server_refuses(tmp_path, name):
    with pytest.raises(UserError, match="model id"):
        form.check_model(name)
    if name != "a":
        with pytest.raises(UserError, match="set name"):
            form.check_set(name if name not in ("1a", "x" * 33, "a..b") else "neurons")
    for layers in (0, 128):
        with pytest.raises(UserError, match=f"{layers} layers"):
            form.check_model("ok", layers)


def test_batches_are_small_enough():
    features = [form.to_feature(record(i, n_contexts=5, n_tokens=1000)) for i in range(20)]
    cut = list(form.batches(features, 6))
    assert [f["index"] for batch in cut for f in batch] == list(range(20))
    assert all(len(batch) <= 6 for batch in cut)
    sizes = [len(form.json_bytes(batch)) for batch in form.batches(features * 6)]
    assert len(sizes) > 1
    assert max(sizes) < 4.5e6


# --------------------------------------------------------------------------------------------------
# upload


def test_dry_run_then_upload(tmp_path, capsys):
    records = [record(i, n_contexts=0 if i % 5 == 0 else 3) for i in range(20)]
    path = write(tmp_path / "features.jsonl", records)
    with Neuronpedia() as server:
        assert call(sae_upload, *flags(path, server)) == 0
        out = capsys.readouterr().out
        assert "16 features, 48 activations, 16 labels; left out: 4 latents" in out
        assert f"model {MODEL}, source {SOURCE}; 1 requests" in out
        assert "nothing was sent" in out
        assert server.requests == []
        assert call(sae_upload, *flags(path, server, "--upload", "--batch_size", 5)) == 0
        out = capsys.readouterr().out
        assert f"{server.api_base.removesuffix('/api')}/{MODEL}/{SOURCE}/1" in out
        assert_all_there_once(server, records)
        assert uploads(server) == 4
        # once more: nothing is sent again
        n = len(server.requests)
        assert call(sae_upload, *flags(path, server, "--upload")) == 0
        assert [path for _, path, _ in server.requests[n:]] == [f"source-set/{MODEL}/{SET}"]
        assert_all_there_once(server, records)
        # the key is nowhere
        assert KEY not in out
        assert not any(KEY in p.read_text() for p in tmp_path.rglob("*") if p.is_file())


class Once:
    """A fault for the nth request of a path, or for several."""

    def __init__(self, path, *faults):
        self.path, self.faults = path, list(faults)

    def __call__(self, path):
        return self.faults.pop(0) if path == self.path and self.faults else None


FAULTS = {
    "limit": [Fault("received", 429)] * 3,
    "500 before": [Fault("received", 500)],
    "503 before": [Fault("received", 503)],
    "500 between the tables": [Fault("neurons", 500)],
    "500 after": [Fault("written", 500)],
    "502 after, then before": [Fault("written", 502), Fault("received", 500)],
    "dropped before": [Fault("received", "drop")],
    "dropped between": [Fault("neurons", "drop")],
    "dropped after": [Fault("written", "drop")],
    "timeout, written later": [Fault("received", "slow")],
    "timeout between": [Fault("neurons", "slow")],
    "timeout after": [Fault("written", "slow")],
    "everything": [Fault("neurons", "drop"), Fault("received", 429), Fault("written", "slow"), Fault("received", 503)],
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_an_upload(tmp_path, name):
    records = [record(i) for i in range(12)]
    fault = Once("feature/upload-batch", None, *FAULTS[name])
    with Neuronpedia(fault) as server:
        client = NeuronpediaClient(KEY, api_base=server.api_base, timeout=0.15)
        with Journal(tmp_path / "j.jsonl", {}, lambda: True) as journal:
            client.create(MODEL, 3, SET)
            client.upload(map(form.to_feature, records), MODEL, SOURCE, journal, batch_size=4)
        assert not fault.faults
        time.sleep(0.1)  # what still was at work
        assert_all_there_once(server, records)


@pytest.mark.parametrize("path", ["model/new", "source-set/new", f"source-set/{MODEL}/{SET}"])
@pytest.mark.parametrize("name", ["limit", "503 before", "500 after", "dropped after", "timeout after"])
def test_faults_on_the_way_to_it(tmp_path, path, name, monkeypatch):
    fault = Once(path, *FAULTS[name])
    monkeypatch.setattr(NeuronpediaClient.__init__, "__kwdefaults__", {"api_base": "", "timeout": 0.15})
    features = write(tmp_path / "features.jsonl", [record(0), record(1)])
    with Neuronpedia(fault) as server:
        assert call(sae_upload, *flags(features, server, "--upload")) == 0
        assert not fault.faults
        assert_all_there_once(server, [record(0), record(1)])


def test_reads_are_repeated_and_give_up_in_the_end(tmp_path):
    with Neuronpedia(Once("activation/get", *[Fault("received", what) for what in (500, "drop", 429)])) as server:
        assert NeuronpediaClient(api_base=server.api_base).activations(MODEL, SOURCE, 1) == []
    with Neuronpedia(lambda _: Fault("received", 503)) as server:
        with pytest.raises(Unsure, match="HTTP 503: busy"):
            NeuronpediaClient(api_base=server.api_base).feature(MODEL, SOURCE, 1)
        n = len(server.requests)
        with pytest.raises(Unsure):  # may have been done: not repeated
            NeuronpediaClient(KEY, api_base=server.api_base).model_new("mine", 3)
        assert len(server.requests) == n + 1
    with Neuronpedia(lambda _: Fault("received", 429)) as server, pytest.raises(Rejected, match="try again in an hour"):
        NeuronpediaClient(api_base=server.api_base).feature(MODEL, SOURCE, 1)
    with pytest.raises(Unsure, match="ConnectionError"):  # nobody there
        NeuronpediaClient(api_base=server.api_base).feature(MODEL, SOURCE, 1)


def test_an_upload_without_its_journal_goes_on(tmp_path):
    """From another machine, or after the folder was deleted: what is there is looked up."""
    records = [record(i) for i in range(12)]
    records[1]["contexts"].append(records[1]["contexts"][0])  # one that stands there twice
    path = write(tmp_path / "features.jsonl", records)
    with Neuronpedia() as server:
        assert call(sae_upload, *flags(write(tmp_path / "a" / "features.jsonl", records[:5]), server, "--upload")) == 0
        server.activations = [a for n, a in enumerate(server.activations) if n not in (3, 7, 9, 12)]  # some were lost
        assert call(sae_upload, *flags(path, server, "--upload")) == 0
        assert_all_there_once(server, records)


def test_other_features_are_not_mixed_with_those_there(tmp_path, capsys):
    path = write(tmp_path / "features.jsonl", [record(0), record(1)])
    with Neuronpedia() as server:
        assert call(sae_upload, *flags(path, server, "--upload")) == 0
        before = copy.deepcopy(server.activations)
        write(path, [record(0), {**record(2), "latent": 1}])
        assert call(sae_upload, *flags(path, server, "--upload")) == 2
        assert "Neuronpedia replaces nothing; use another --set_name" in capsys.readouterr().err
        next(tmp_path.glob("neuronpedia/*.jsonl")).unlink()
        assert call(sae_upload, *flags(path, server, "--upload")) == 2
        assert "feature 1 is there already with other activations" in capsys.readouterr().err
        assert server.activations == before
        assert call(sae_upload, *flags(path, server, "--upload", "--set_name", "second")) == 0


def test_a_source_set_of_somebody_else(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "features.jsonl", [record(0)])
    with Neuronpedia() as server:
        NeuronpediaClient("sk-np-other", api_base=server.api_base).create(MODEL, 3, SET)
        assert call(sae_upload, *flags(path, server, "--upload")) == 2
        err = capsys.readouterr().err
        assert f"HTTP 500: {OPAQUE}" in err
        assert f"is the source set of '{SOURCE}' yours?" in err
        monkeypatch.setenv("NEURONPEDIA_API_KEY", "sk-np-wrong")
        assert call(sae_upload, *flags(path, server, "--upload", "--set_name", "third")) == 2
        err = capsys.readouterr().err
        assert "does not take the key; set NEURONPEDIA_API_KEY" in err
        assert "sk-np-wrong" not in err
        assert not server.neurons


def test_the_journal(tmp_path):
    path = tmp_path / "deep" / "j.jsonl"
    with Journal(path, {"to": "a"}, lambda: True) as journal:
        journal.begin([1, 2])
        journal.finish([1, 2])
        journal.begin([3])
        with pytest.raises(UserError, match="another process is uploading"):
            Journal(path, {"to": "a"}, lambda: True)
    whole = path.read_text()
    path.write_text(whole + '{"done": [3')  # killed while writing
    with Journal(path, {"to": "a"}, lambda: pytest.fail("asked once")) as journal:
        assert (journal.done, journal.begun, journal.empty) == ({1, 2}, {1, 2, 3}, True)
        journal.finish([3])
    assert path.read_text() == whole + '{"done": [3]}\n'
    with pytest.raises(UserError, match="use another --set_name"):
        Journal(path, {"to": "b"}, lambda: True)
    path.write_text("{}\nno json\n")
    with pytest.raises(UserError, match="is damaged"):
        Journal(path, {"to": "b"}, lambda: True)


def upload_in_a_hurry(argv):
    """The script, in a process of its own."""
    os.environ["NEURONPEDIA_API_KEY"] = KEY
    neuronpedia.SETTLE_S, neuronpedia.BACKOFF_S = 0.3, 0.002
    sae_upload.main([str(a) for a in argv])


def test_killed_20_times(tmp_path, capfd):
    """At a random moment of a random request, or at a random time; started again each time, to the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_neuronpedia"])
    rng, victim, moments = random.Random(0), [], Counter()

    def fault(path):
        if path != "feature/upload-batch" or not victim or rng.random() > 0.3:
            return None
        at = rng.choice(["received", "neurons", "written", "answered"])
        moments[at] += 1
        return Fault(at, ("kill", victim.pop()))

    records = [record(i, n_contexts=0 if i % 7 == 0 else 3) for i in range(280)]
    path = write(tmp_path / "features.jsonl", records)
    with Neuronpedia(fault, write_s=0.01) as server:
        kills = 0
        while True:
            process = context.Process(
                target=upload_in_a_hurry, args=(flags(path, server, "--upload", "--batch_size", 4),)
            )
            process.start()
            if kills < 10:
                victim[:] = [process.pid]
            elif kills < 20:
                time.sleep(rng.uniform(0.02, 0.5))
                os.kill(process.pid, signal.SIGKILL)
            process.join()
            victim.clear()
            if process.exitcode == 0:
                break
            assert process.exitcode == -signal.SIGKILL, capfd.readouterr().err
            kills += 1
        assert kills >= 20
        assert len(moments) == 4, moments
        assert_all_there_once(server, records)
        assert server.counts["model/new"] == server.counts["source-set/new"] == 1
        assert KEY not in "".join(capfd.readouterr())


# --------------------------------------------------------------------------------------------------
# the key


def test_the_key_goes_nowhere_else(tmp_path, capsys, monkeypatch):
    with pytest.raises(UserError, match="unencrypted"):
        NeuronpediaClient(KEY, api_base="http://neuronpedia.example/api")
    for address in ("neuronpedia.org/api", "ftp://x/api", ""):
        with pytest.raises(UserError, match="no address"):
            NeuronpediaClient(KEY, api_base=address)
    for key in ("sk np", "sk\nnp", "sk\u00e9"):
        with pytest.raises(UserError, match="no key has") as e:
            NeuronpediaClient(key)
        assert key not in str(e.value)
    seen = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.path)
            self.send_response(308)
            self.send_header("Location", "/caught")
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        client = NeuronpediaClient(KEY, api_base=f"http://127.0.0.1:{server.server_port}/api")
        with pytest.raises(Rejected, match="sends requests on to '/caught'"):
            client.feature(MODEL, SOURCE, 1)
        server.shutdown()
    assert seen == [f"/api/feature/{MODEL}/{SOURCE}/1"]
    assert KEY not in repr(vars(client) | {"_session": None})
    monkeypatch.delenv("NEURONPEDIA_API_KEY")
    path = write(tmp_path / "features.jsonl", [record(0)])
    with Neuronpedia() as site:
        assert call(sae_upload, *flags(path, site, "--upload")) == 2
        assert "no API key; set NEURONPEDIA_API_KEY" in capsys.readouterr().err
        asked = []
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("getpass.getpass", lambda text: asked.append(text) or KEY)
        assert call(sae_upload, *flags(path, site, "--upload")) == 0
    assert len(asked) == 1
    told = capsys.readouterr()
    assert KEY not in told.out + told.err


# --------------------------------------------------------------------------------------------------
# reading


def test_reading_what_is_there():
    with Neuronpedia() as server:
        client = NeuronpediaClient(KEY, api_base=server.api_base)
        client.create(MODEL, 3, SET)
        assert client.source_set(MODEL, SET)["sources"] == ["0-mine", "1-mine", "2-mine"]
        assert client.source_set(MODEL, "none") is None
        assert client.feature(MODEL, SOURCE, 5) is None
        feature = form.to_feature(record(5))
        server.upload_batch({"modelId": MODEL, "source": SOURCE, "features": [feature]}, "user1", lambda _: None)
        row = client.feature(MODEL, SOURCE, 5)
        assert row["pos_str"] == [t["token"] for t in feature["topLogits"]]
        assert len(row["activations"]) == len(client.activations(MODEL, SOURCE, 5)) == 3
        before = len(server.requests)
        with pytest.raises(UserError, match="1 to 128 were wanted"):
            client.upload([], MODEL, SOURCE, None, batch_size=129)
        assert len(server.requests) == before
        with pytest.raises(Rejected, match="Model already exists"):
            client.model_new(MODEL, 3)


# --------------------------------------------------------------------------------------------------
# files


@pytest.fixture
def run(tmp_path, gpt_path, monkeypatch):
    """A folder with an SAE of 8 latents on the tiny GPT's layer 1 and its features.jsonl, two of them silent."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "sae_models" / "layer_1"
    sae = create_sae(SAEConfig(d_in=32, d_sae=8, k=2))
    store.save_sae(sae, folder, hookpoint="transformer.h.1", model_name=gpt_path, dataset_path="embedded")
    write(folder / "features" / "features.jsonl", [record(i, n_contexts=0 if i > 5 else 3) for i in range(8)])
    return folder


def test_the_import_tree(run, tmp_path, capsys):
    flags = ["--export", "out", "--model_id", MODEL, "--set_name", SET]
    assert call(sae_upload, *flags) == 0
    root = tmp_path / "out" / MODEL / SOURCE
    assert f"written to out/{MODEL}/{SOURCE}" in capsys.readouterr().out
    db = Neuronpedia()
    origins = import_tree(root, db)
    assert origins["model"][0]["layers"] == 3
    assert origins["model"][0]["dimension"] == 32
    assert origins["source"][0]["id"] == SOURCE
    assert origins["sourceset"][0]["releaseName"] == origins["release"][0]["name"]
    assert len(db.neurons) == 8
    assert len(db.activations) == 18
    assert len(db.explanations) == 8
    row, feature = db.neurons[MODEL, SOURCE, "3"], form.to_feature(record(3))
    assert row["hookName"] == "blocks.1.hook_resid_post"
    W_dec = store.load_sae(run).W_dec.detach()
    assert np.array_equal(np.array(row["vector"], dtype=np.float32), W_dec[3].numpy())
    assert (
        row["vectorDefaultSteerStrength"]
        == row["maxActApprox"]
        == max(max(a["values"]) for a in feature["activations"])
    )
    assert row["freq_hist_data_bar_heights"] == [5, 7]
    assert row["freq_hist_data_bar_values"] == [0.5, 1.5]
    assert (row["topkCosSimIndices"], row["correlated_features_indices"]) == ([4], [5])
    assert row["pos_values"] == [t["value"] for t in feature["topLogits"]]
    acts = [a for k, a in db.activations if k[2] == "3"]
    assert [a["values"][a["maxValueTokenIndex"]] for a in acts] == [a["maxValue"] for a in acts]
    assert [(a["binMin"], a["binContains"]) for a in acts] == [(-1, -1), (-1, -1), (0.5, 0.125)]
    for (_, _, i), rows in itertools.groupby(db.activations, key=lambda pair: pair[0]):
        sent = [a["tokens"] for a in form.to_feature(record(int(i)))["activations"]]
        assert [a["tokens"] for _, a in rows] == sent  # a backslash with u0000 too
    # importing a second export adds nothing
    assert call(sae_upload, *flags) == 0
    import_tree(root, db)
    assert (len(db.neurons), len(db.activations), len(db.explanations)) == (8, 18, 8)


def test_feature_json_for_graphs(run, tmp_path):
    assert call(sae_upload, "--graph_features", "graph", "--model_id", MODEL) == 0
    assert {p.name for p in (tmp_path / "graph").iterdir()} == {f"{i}.json" for i in range(6)}
    value = json.loads((tmp_path / "graph" / "2.json").read_text())
    assert value["index"] == 2
    assert [(q["quantile_name"], len(q["examples"])) for q in value["examples_quantiles"]] == [
        ("Top activations", 2),
        ("Interval 0.5 - 1.25", 1),
    ]
    example, context = value["examples_quantiles"][0]["examples"][0], record(2)["contexts"][0]
    assert example["tokens_acts_list"] == context["values"]
    assert len(example["tokens"]) == len(context["tokens"])
    assert all(isinstance(t, str) for t in value["top_logits"] + value["bottom_logits"])


def test_the_newest_run_as_it_stands(run, capsys):
    assert call(sae_upload) == 0
    out = capsys.readouterr().out
    assert "to https://www.neuronpedia.org/api: model ckpt-pt, source 1-nanosae; 1 requests" in out
    assert call(sae_upload, "--upload") == 2
    assert "--upload wants --model_id" in capsys.readouterr().err
    assert call(sae_upload, "--upload", "--dry_run", "--model_id", "x1") == 2
    assert call(sae_upload, "--layer", 3, "--export", "out") == 2
    assert "layer 3 was given and the model has 3" in capsys.readouterr().err
    assert call(sae_upload, "--set_name", "a_b") == 2
    with Neuronpedia() as server:
        assert call(sae_upload, "--upload", "--model_id", MODEL, "--set_name", SET, "--api_base", server.api_base) == 0
        assert_all_there_once(server, [record(i, n_contexts=0 if i > 5 else 3) for i in range(8)])
        assert server.models[MODEL]["layers"] == 3
    assert len(list((run / "neuronpedia").iterdir())) == 1
