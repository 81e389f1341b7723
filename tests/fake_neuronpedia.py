"""A Neuronpedia on this machine: the documented rules of its API, strictly, and tables as its database has them.

Faults are planned by request: `fault(path)` names what happens to the next request, see Fault. Written from the
server's rules, not from our client: what one of the two gets wrong, the other shows.
"""

import gzip
import json
import os
import re
import signal
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KEY = "sk-np-right"
PUBLIC = ("activation/get",)
PRIVATE = ("model/new", "source-set/new")
OPAQUE = "Something went wrong on our end. The error has been reported."
CREATORS = {KEY: "user1", "sk-np-other": "user2"}
LIMITS = {"model/new": 5, "source-set/new": 10}
# columns of the tables that rows are written to
NEURON = (
    "modelId layer index sourceSetName creatorId createdAt maxActApprox hasVector vector vectorLabel "
    "vectorDefaultSteerStrength hookName topkCosSimIndices topkCosSimValues neuron_alignment_indices "
    "neuron_alignment_values neuron_alignment_l1 correlated_neurons_indices correlated_neurons_pearson "
    "correlated_neurons_l1 correlated_features_indices correlated_features_pearson correlated_features_l1 neg_str "
    "neg_values pos_str pos_values frac_nonzero freq_hist_data_bar_heights freq_hist_data_bar_values "
    "logits_hist_data_bar_heights logits_hist_data_bar_values decoder_weights_dist"
)
ACTIVATION = (
    "id tokens values index layer modelId dataIndex dataSource maxValue maxValueTokenIndex minValue dfaValues "
    "dfaTargetIndex dfaMaxValue zQIndices zKIndices zValues creatorId createdAt lossValues logitContributions binMin "
    "binMax binContains qualifyingTokenIndex"
)
EXPLANATION = "id modelId layer index description authorId typeName explanationModelName notes createdAt"
ORIGINS = {  # columns of the tables that come before; the first two are needed
    "release": "name creatorName description descriptionShort urls creatorNameShort creatorId createdAt visibility "
    "isNewUi featured defaultSourceSetName",
    "model": "id layers instruct creatorId displayName displayNameShort tlensId dimension neuronsPerLayer owner "
    "visibility createdAt updatedAt",
    "sourceset": "modelId name creatorId description creatorName releaseName visibility type urls hasDashboards "
    "allowInferenceSearch defaultRange defaultShowBreaks showDfa showCorrelated showHeadAttribution showUmap createdAt",
    "source": "id modelId setName creatorId hasDashboards inferenceEnabled saelensConfig saelensRelease saelensSaeId "
    "hfRepoId hfFolderId visibility num_prompts num_tokens_in_prompt dataset notes createdAt",
}


class Answer(Exception):
    """An answer other than 200."""

    def __init__(self, status, body):
        super().__init__(status)
        self.status, self.body = status, body


def refuse(message, status=400):
    return Answer(status, {"error": message, "message": message})


def valid(good, message):
    """A rule of the request's schema, which the answer names."""
    if not good:
        raise refuse(message)


def kept(good):
    """A rule that the route checks itself; its reason does not reach the client."""
    if not good:
        raise refuse(OPAQUE, 500)


def strings(value):
    """All texts in a json value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def is_text(value):
    return isinstance(value, str) and value != ""


class Fault:
    """What happens to a request: `at` one of the moments, then `what`.

    at: "received", "neurons" (written, activations not yet), "written", "answered". what: "drop" the connection,
    "slow" (go on when the client has given up), a status to answer with, or ("kill", pid) to kill the client.
    """

    def __init__(self, at, what):
        self.at, self.what = at, what


class Neuronpedia:
    """The server's state, and the server while it is used as a context manager."""

    def __init__(self, fault=lambda _: None, write_s=0.0):
        self.models, self.sets, self.sources = {}, {}, set()
        self.neurons, self.activations, self.explanations = {}, [], []
        self.requests, self.counts, self.ids = [], {}, set()
        self.fault, self.write_s = fault, write_s
        self.lock = threading.Lock()

    def __enter__(self):
        site = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                site.serve(self, "GET")

            def do_POST(self):
                site.serve(self, "POST")

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_):  # clients that are killed leave broken pipes
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.api_base = f"http://127.0.0.1:{self.server.server_port}/api"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    # ---- one request

    def serve(self, handler, method):
        length = int(handler.headers.get("Content-Length", 0))
        raw = handler.rfile.read(length)
        if len(raw) < length:
            return
        path = handler.path.removeprefix("/api/")
        with self.lock:
            fault = self.fault(path)
            self.requests.append((method, path, len(raw)))
        fault = fault or Fault("", None)
        moment = lambda at: self.strike(fault, handler.connection) if fault.at == at else None
        try:
            moment("received")
            status, body = 200, self.route(method, path, raw, handler.headers.get("x-api-key"), moment)
            moment("written")
        except Answer as e:
            status, body = e.status, e.body
        except ConnectionAbortedError:
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        data = json.dumps(body).encode()
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data)))
        if status == 429:
            handler.send_header("Retry-After", "0.01")
        handler.end_headers()
        handler.wfile.write(data)
        handler.wfile.flush()
        moment("answered")

    def strike(self, fault, connection):
        if fault.what == "drop":
            raise ConnectionAbortedError
        if fault.what == "slow":
            connection.recv(1)  # nothing more is sent: it returns when the other end hangs up
            time.sleep(0.05)
        elif isinstance(fault.what, int):
            raise refuse(OPAQUE if fault.what == 500 else "busy", fault.what)
        else:
            os.kill(fault.what[1], signal.SIGKILL)

    def route(self, method, path, raw, key, moment):
        self.counts[path] = self.counts.get(path, 0) + 1
        if self.counts[path] > LIMITS.get(path, 25_000):
            raise Answer(429, {"endpoint": f"/api/{path}", "remainingRequests": 0, "error": "Rate limit exceeded"})
        parts = path.split("/")
        if method == "GET" and parts[0] == "feature" and len(parts) == 4:
            return self.get_feature(*parts[1:])
        if method == "GET" and parts[0] == "source-set" and len(parts) == 3:
            found = self.sets.get((parts[1], parts[2]))
            if found is None:
                raise refuse("Not found", 404)
            return found
        if method != "POST":
            raise refuse("Not found", 404)
        body = json.loads(raw, parse_constant=lambda word: valid(False, f"{word} is no json"))
        name = path.replace("/", "_").replace("-", "_")
        if path in PUBLIC:
            return getattr(self, name)(body)
        if key not in CREATORS:
            raise refuse("This endpoint requires authorization. Specify your API key in the header x-api-key.", 401)
        if path == "feature/upload-batch":
            return self.upload_batch(body, CREATORS[key], moment)
        if path not in PRIVATE:
            raise refuse("Not found", 404)
        return getattr(self, name)(body, CREATORS[key])

    # ---- models and source sets

    def model_new(self, body, user):
        name, layers = body.get("id"), body.get("layers")
        valid(is_text(name) and 2 <= len(name) <= 32, "id: 2 to 32 characters")
        valid(re.fullmatch(r"[a-z][a-z0-9.-]*[a-z0-9]|[a-z]", name), "id: pattern")
        valid("--" not in name and ".." not in name, "id: double")
        valid(isinstance(layers, int) and 1 <= layers <= 127, "layers: 1 to 127")
        shown = body.get("displayName")
        valid(shown is None or 1 <= len(shown) <= 64, "displayName: 1 to 64")
        with self.lock:
            valid(name not in self.models, "Model already exists")
            self.models[name] = {"id": name, "creatorId": user, "layers": layers, "dimension": None}
        return self.models[name]

    def source_set_new(self, body, user):
        model, name = body.get("modelId"), body.get("name")
        valid(is_text(name) and re.fullmatch(r"[a-z][a-z0-9-]*[a-z0-9]|[a-z0-9]", name), "name: pattern")
        valid(name != "neurons" and "--" not in name, "name: not this one")
        valid(len(body.get("description") or "") <= 128, "description: 128 at most")
        valid(model in self.models, "Model not found")
        with self.lock:
            valid((model, name) not in self.sets, "Source set name already exists for this model.")
            sources = [f"{n}-{name}" for n in range(self.models[model]["layers"])]
            self.sets[model, name] = {"modelId": model, "name": name, "creatorId": user, "sources": sources}
            self.sources |= {(model, source) for source in sources}
        return self.sets[model, name]

    # ---- features

    def check_feature(self, f):
        whole = lambda v: isinstance(v, int) and not isinstance(v, bool)
        valid(whole(f.get("index")) and 0 <= f["index"] <= 10_000_000, "index")
        density = f.get("density", 0)
        valid(is_number(density) and 0 <= density <= 1, "density")
        for name in ("topLogits", "bottomLogits"):
            logits = f.get(name)
            valid(logits is None or (isinstance(logits, list) and len(logits) <= 20), name)
            for logit in logits or []:
                valid(isinstance(logit, dict) and is_text(logit.get("token")), f"{name} token")
                valid(is_number(logit.get("value")), f"{name} value")
        for e in f.get("explanations", []):
            valid(is_text(e.get("text")) and len(e["text"]) <= 512, "explanation text")
        valid(isinstance(f.get("activations"), list) and len(f["activations"]) >= 1, "activations")
        for a in f["activations"]:
            valid(isinstance(a.get("tokens"), list) and 1 <= len(a["tokens"]) <= 1024, "tokens")
            valid(all(is_text(t) for t in a["tokens"]), "token")
            valid(isinstance(a.get("values"), list) and 1 <= len(a["values"]) <= 1024, "values")
            valid(all(is_number(v) for v in a["values"]), "value")
            for name, high in (("quantileMin", 99999999), ("quantileMax", 99999999), ("quantileFraction", 1)):
                v = a.get(name)
                valid(v is None or (is_number(v) and v <= high), name)
            v = a.get("quantileFraction")
            valid(v is None or v >= 0, "quantileFraction")

    def upload_batch(self, body, user, moment):
        valid(is_text(body.get("modelId")) and is_text(body.get("source")), "modelId and source")
        model, source, features = body["modelId"].lower(), body["source"].lower(), body.get("features")
        valid(isinstance(features, list) and 1 <= len(features) <= 128, "features: 1 to 128")
        for f in features:
            self.check_feature(f)
        owner = self.sets.get((model, source.partition("-")[2].partition("__")[0]))
        kept(owner is not None and owner["creatorId"] == user)
        kept((model, source) in self.sources)
        kept(all(len(a["tokens"]) == len(a["values"]) for f in features for a in f["activations"]))
        kept(len({f["index"] for f in features}) == len(features))
        kept(not any("modelName" in e for f in features for e in f.get("explanations", [])))
        kept(all("\0" not in text and not re.search("[\ud800-\udfff]", text) for text in strings(features)))
        time.sleep(self.write_s)
        with self.lock:
            for f in features:
                key = (model, source, str(f["index"]))
                row = {
                    "modelId": model,
                    "layer": source,
                    "index": str(f["index"]),
                    "creatorId": user,
                    "frac_nonzero": f.get("density", -1),
                    "hasVector": False,
                    "maxActApprox": max(max(a["values"]) for a in f["activations"]),
                    "pos_str": [x["token"] for x in f.get("topLogits") or []],
                    "pos_values": [x["value"] for x in f.get("topLogits") or []],
                    "neg_str": [x["token"] for x in f.get("bottomLogits") or []],
                    "neg_values": [x["value"] for x in f.get("bottomLogits") or []],
                }
                self.neurons.setdefault(key, row)  # skipDuplicates
        moment("neurons")
        time.sleep(self.write_s)
        with self.lock:
            for f in features:
                key = (model, source, str(f["index"]))
                self.activations += [(key, a) for a in f["activations"]]
                self.explanations += [(key, e["text"]) for e in f.get("explanations", [])]
        return {"message": f"{len(features)} features created."}

    def rows(self, key):
        found = [a for k, a in self.activations if k == key]
        rows = [
            {
                "tokens": a["tokens"],
                "values": a["values"],
                "maxValue": max(a["values"]),
                "binMin": a.get("quantileMin"),
                "binMax": a.get("quantileMax"),
                "binContains": a.get("quantileFraction"),
            }
            for a in found
        ]
        return sorted(rows, key=lambda a: -a["maxValue"])

    def get_feature(self, model, source, index):
        key = (model, source, index)
        with self.lock:
            if key not in self.neurons:
                raise refuse("Not found", 404)
            said = [{"description": text, "scores": []} for k, text in self.explanations if k == key]
            return {**self.neurons[key], "activations": self.rows(key), "explanations": said, "lists": []}

    def activation_get(self, body):
        with self.lock:
            return self.rows((body["modelId"], body["source"], body["index"]))


def import_tree(root: Path, db: Neuronpedia) -> dict[str, list[dict]]:
    """The bulk import: rows of a source's folder into `db`, as lib/db/import.ts does it; the four origins' rows.

    Columns come from the first line of a file; a row that is there already is left alone.
    """
    origins = {}
    for name, columns in ORIGINS.items():
        origins[name] = [json.loads(line) for line in (root / f"{name}.jsonl").read_text().splitlines()]
        for row in origins[name]:
            assert not row.keys() - set(columns.split()), f"{name} has no column {row.keys() - set(columns.split())}"
            assert all(row.get(c) is not None for c in columns.split()[:2]), name
    for table, known in (("features", NEURON), ("activations", ACTIVATION), ("explanations", EXPLANATION)):
        for file in sorted((root / table).glob("*.jsonl.gz")):
            lines = gzip.decompress(file.read_bytes()).decode().replace("\\u0000", " ").splitlines()
            columns = json.loads(lines[0]).keys()
            assert columns <= set(known.split()), f"{table} has no column {columns - set(known.split())}"
            for line in lines:
                row = json.loads(line)
                assert row.keys() == columns, "the import reads the first line's columns only"
                key = (row["modelId"], row["layer"], row["index"])
                if table == "features":
                    db.neurons.setdefault(key, row)
                    continue
                assert key in db.neurons, f"{table}: no such feature {key}"
                assert re.fullmatch(r"c[0-9a-z]{24}", row["id"])
                if row["id"] not in db.ids:
                    db.ids.add(row["id"])
                    (db.activations if table == "activations" else db.explanations).append((key, row))
    return origins
