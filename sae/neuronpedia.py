"""NeuronpediaClient: what Neuronpedia's web API really does, and uploads that end with every activation there once.

Its upload adds the activations of a request again when that is sent again, so nothing is repeated on suspicion: what
became of an unanswered request is looked up first, and a journal beside the features remembers what is known.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import requests

from sae import log
from sae.config import UserError, require
from sae.pages.neuronpedia_format import MAX_FEATURES, as_json, batches, check_model, check_set

API_BASE = "https://www.neuronpedia.org/api"
KEY = "NEURONPEDIA_API_KEY"
ATTEMPTS = 6
BACKOFF_S = 1.0  # doubled from attempt to attempt
LIMIT_WAIT_S = 15.0  # the same, after HTTP 429; its window is 60 minutes
SETTLE_S = 60.0  # how long a request may still be at work on the server after it was sent or lost


class Refused(UserError):
    """The server said no, and will do so again. status: its HTTP status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Unsure(UserError):
    """Whether the server did what it was asked is not known. over: it is not doing it now."""

    def __init__(self, message: str, *, over: bool):
        super().__init__(message)
        self.over = over


class NeuronpediaClient:
    """Neuronpedia's API, at neuronpedia.org or a local one (api_base="http://localhost:3000/api").

    api_key: for what needs one; nothing keeps or shows it. timeout: seconds without a word until a request counts as
    unanswered. Requests that only read are repeated after faults, and all of them after HTTP 429, slower and slower.
    Raises UserError for arguments that the server would refuse, Refused if it refuses, Unsure if it does not answer.
    Model and source ids are those of its addresses: `gpt2-small`, `9-res-jb`.
    """

    def __init__(self, api_key: str | None = None, *, api_base: str = API_BASE, timeout: float = 120.0):
        parts = urlsplit(api_base)
        web = parts.scheme in ("http", "https") and bool(parts.hostname)
        require(web, f"'{api_base}' is no address of an API; one such as {API_BASE} was wanted")
        key, private = api_key or "", parts.scheme == "https" or parts.hostname in ("localhost", "127.0.0.1", "::1")
        require(private or not key, f"'{api_base}' would carry the key unencrypted; give an https address")
        require(key.isascii() and key.isprintable() and " " not in key, "the key holds characters that no key has")
        self.api_base, self.timeout = api_base.rstrip("/"), timeout
        self._session = requests.Session()
        if api_key:
            self._session.headers["x-api-key"] = api_key

    # ---- one request

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        """One request and its answer. Waits where the rate limit says so; repeats nothing else."""
        data = None if body is None else as_json(body)
        for attempt in range(ATTEMPTS * 2):
            try:
                # a redirect would take the key to another host
                answer = self._session.request(
                    method, f"{self.api_base}/{path}", data=data, timeout=(10, self.timeout), allow_redirects=False,
                    headers={"Content-Type": "application/json"} if data else None,
                )  # fmt: skip
            except requests.RequestException as e:
                raise Unsure(f"no answer from {self.api_base}/{path} ({type(e).__name__})", over=False) from e
            if answer.status_code != 429:
                return self._read(answer, path)
            told = answer.headers.get("Retry-After", "")
            wait = float(told) if told.replace(".", "", 1).isdigit() else min(600, LIMIT_WAIT_S * 2**attempt)
            if wait > 1:
                log.say(f"the rate limit of {path} is reached; going on in {wait:.0f} s")
            time.sleep(wait)
        raise Refused(f"the rate limit of {self.api_base}/{path} is still reached; try again in an hour", 429)

    def _read(self, answer: requests.Response, path: str) -> Any:
        status = answer.status_code
        try:
            content = answer.json()
        except ValueError:
            content = None
        if status == 200:
            if content is None and answer.text.strip() != "null":
                raise Unsure(f"{self.api_base}/{path} answered with no json; is that the API's address?", over=True)
            return content
        said = (content.get("error") or content.get("message")) if isinstance(content, dict) else None
        said = said or answer.reason
        if 300 <= status < 400:
            elsewhere = answer.headers.get("Location")
            raise Refused(f"{self.api_base} sends requests on to '{elsewhere}'; give that host as --api_base", status)
        if status == 401:
            raise Refused(f"{self.api_base} does not take the key; set {KEY} to the one in the site's settings", status)
        if status >= 500:
            raise Unsure(f"{self.api_base}/{path} failed (HTTP {status}: {said})", over=status == 500)
        raise Refused(f"{self.api_base}/{path} refused (HTTP {status}: {said})", status)

    def _look(self, method: str, path: str, body: Any = None) -> Any:
        """A request that changes nothing there, and so may be repeated. None for what does not exist."""
        for attempt in range(ATTEMPTS):
            try:
                return self._ask(method, path, body)
            except Unsure:
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(BACKOFF_S * 2**attempt)
            except Refused as e:
                if e.status == 404:
                    return None
                raise
        return None

    # ---- models, source sets, features

    def model_new(self, model_id: str, layers: int, display_name: str | None = None, url: str | None = None) -> None:
        """Create an unlisted model. Refused if it exists."""
        check_model(model_id, layers, display_name)
        body = {"id": model_id, "layers": layers, "displayName": display_name, "url": url}
        self._ask("POST", "model/new", {name: value for name, value in body.items() if value is not None})

    def source_set_new(self, model_id: str, name: str, description: str = "", url: str | None = None) -> None:
        """Create a source set, with a source `{layer}-{name}` for each layer of the model. Refused if it exists."""
        check_set(name, description)
        body = {"modelId": model_id, "name": name, "description": description or None, "url": url}
        self._ask("POST", "source-set/new", {name: value for name, value in body.items() if value is not None})

    def source_set(self, model_id: str, name: str) -> dict[str, Any] | None:
        return self._look("GET", f"source-set/{quote(model_id)}/{quote(name)}")

    def feature(self, model_id: str, source: str, index: int) -> dict[str, Any] | None:
        """A feature with its activations and explanations; None if it is not there. Needs no key."""
        return self._look("GET", f"feature/{quote(model_id)}/{quote(source)}/{index}")

    def page(self, model_id: str, source: str, index: int) -> str:
        """The address of a feature's page."""
        return f"{self.api_base.removesuffix('/api')}/{model_id}/{source}/{index}"

    # ---- asking the models there

    def activations(self, model_id: str, source: str, index: int) -> list[dict[str, Any]]:
        """The stored activations of a feature."""
        return self._look("POST", "activation/get", {"modelId": model_id, "source": source, "index": str(index)})

    def activation_new(
        self, model_id: str, source: str, index: int, text: str | Sequence[str], *, ignore_bos: bool = False
    ) -> Any:
        """What a feature does on a text of one's own: tokens, values, maxValue, ...; a list for several texts."""
        require(bool(text), "no text was given")
        feature = {"modelId": model_id, "source": source, "index": str(index)}
        return self._ask("POST", "activation/new", {"feature": feature, "customText": text, "ignoreBos": ignore_bos})

    def search_all(
        self, model_id: str, source_set: str, text: str, *, sources: Sequence[str] = (),
        sort_indexes: Sequence[int] = (), ignore_bos: bool = True, density_threshold: float = -1, num_results: int = 50,
    ) -> dict[str, Any]:  # fmt: skip
        """The features of a source set, or of some sources in it, that fire most on a text, or at `sort_indexes`."""
        require(bool(text.strip()), "no text was given")
        require(1 <= num_results <= 100, f"{num_results} results were asked for; 1 to 100 were wanted")
        _check_density(density_threshold)
        body = {
            "modelId": model_id, "sourceSet": source_set, "text": text, "selectedLayers": list(sources),
            "sortIndexes": list(sort_indexes), "ignoreBos": ignore_bos, "densityThreshold": density_threshold,
            "numResults": num_results,
        }  # fmt: skip
        return self._ask("POST", "search-all", body)

    def search_topk_by_token(
        self, model_id: str, source: str, text: str | Sequence[str], *, num_results: int = 10, ignore_bos: bool = True,
        density_threshold: float = -1,
    ) -> dict[str, Any]:  # fmt: skip
        """The features of a source that fire most on each token of a text; density_threshold -1 leaves out none."""
        require(bool(text), "no text was given")
        require(1 <= num_results <= 20, f"{num_results} results were asked for; 1 to 20 were wanted")
        _check_density(density_threshold)
        body = {
            "modelId": model_id, "source": source, "text": text, "numResults": num_results, "ignoreBos": ignore_bos,
            "densityThreshold": density_threshold,
        }  # fmt: skip
        return self._look("POST", "search-topk-by-token", body)

    def steer(
        self, model_id: str, prompt: str, features: Iterable[tuple[str, int, float]], *, n_tokens: int = 48,
        temperature: float = 0.5, seed: int = 16, strength_multiplier: float = 1.0, method: str = "SIMPLE_ADDITIVE",
    ) -> dict[str, Any]:  # fmt: skip
        """Continue a prompt with features (source, index, strength) added, and without: {"STEERED", "DEFAULT", ...}."""
        require(0 < len(prompt) <= 2048, f"the prompt has {len(prompt)} characters; 1 to 2,048 were wanted")
        require(1 <= n_tokens <= 1024, f"n_tokens={n_tokens}; 1 to 1,024 were wanted")
        require(0 <= temperature <= 2, f"temperature={temperature}; it must lie in 0..2")
        require(0 <= strength_multiplier <= 10, f"strength_multiplier={strength_multiplier}; it must lie in 0..10")
        methods = ("SIMPLE_ADDITIVE", "ORTHOGONAL_DECOMP", "PROJECTION_CAP")
        require(method in methods, f"method='{method}'; one of {', '.join(methods)} was wanted")
        chosen = [{"modelId": model_id, "layer": s, "index": i, "strength": strength} for s, i, strength in features]
        body = {
            "prompt": prompt, "modelId": model_id, "features": chosen, "temperature": temperature, "n_tokens": n_tokens,
            "freq_penalty": 0, "seed": seed, "strength_multiplier": strength_multiplier, "steer_method": method,
            "stream": False,
        }  # fmt: skip
        return self._ask("POST", "steer", body)

    # ---- lists and explanations

    def lists(self) -> list[dict[str, Any]]:
        """One's own lists of features."""
        return self._look("POST", "list/list", {})

    def list_get(self, list_id: str) -> dict[str, Any] | None:
        return self._look("POST", "list/get", {"listId": list_id})

    def list_new(
        self, name: str, description: str = "", features: Iterable[tuple[str, str, int, str]] = (), test_text: str = ""
    ) -> dict[str, Any]:
        """Create a list of features (model, source, index, description)."""
        body = {"name": name, "description": description, "testText": test_text, "features": _listed(features)}
        return self._ask("POST", "list/new-with-features", body)

    def list_add(self, list_id: str, features: Iterable[tuple[str, str, int, str]]) -> Any:
        """Add at most 100 features (model, source, index, description) to a list."""
        chosen = _listed(features)
        require(1 <= len(chosen) <= 100, f"{len(chosen)} features were given; 1 to 100 were wanted")
        return self._ask("POST", "list/add-features", {"listId": list_id, "featuresToAdd": chosen})

    def search_explanations(
        self, query: str, model_id: str | None = None, sources: Sequence[str] = (), offset: int = 0
    ) -> dict[str, Any]:
        """20 explanations near a query, from `offset` on: in these sources of a model, in a model, or everywhere."""
        require(len(query) >= 3, f"the query '{query}' is short; 3 characters or more were wanted")
        require(not sources or model_id is not None, "sources belong to a model; give model_id too")
        body: dict[str, Any] = {"query": query, "offset": offset}
        if model_id is None:
            return self._look("POST", "explanation/search-all", body)
        body["modelId"] = model_id
        if not sources:
            return self._look("POST", "explanation/search-model", body)
        return self._look("POST", "explanation/search", {**body, "layers": list(sources)})

    # ---- upload

    def create(self, model_id: str, layers: int, set_name: str) -> None:
        """Create the model and the source set, unless they exist."""
        for new in (lambda: self.model_new(model_id, layers), lambda: self.source_set_new(model_id, set_name)):
            for attempt in range(3):  # the server allows 5 models an hour
                try:
                    new()
                except Refused as e:
                    if "already exists" not in str(e):
                        raise
                except Unsure:  # had it been made, the next attempt says that it exists
                    if attempt == 2:
                        raise
                    time.sleep(BACKOFF_S * 2**attempt)
                    continue
                break

    def upload(
        self, features: Iterable[dict[str, Any]], model_id: str, source: str, journal: Journal,
        *, batch_size: int = MAX_FEATURES, sent: Callable[[int], Any] = lambda _: None,
    ) -> None:  # fmt: skip
        """Upload features (neuronpedia_format.to_feature) to a source of one's own, each and each activation once.

        The source set must exist. journal: what is known of earlier uploads to it; killed at any moment, the same call
        goes on. sent(n) is called when n more features are known to be there.
        """
        require(1 <= batch_size <= MAX_FEATURES, f"batch_size={batch_size}; 1 to {MAX_FEATURES} were wanted")

        def new() -> Iterable[dict[str, Any]]:
            for feature in features:
                if feature["index"] in journal.done:
                    sent(1)
                else:
                    yield feature

        for batch in batches(new(), batch_size):
            self._send(batch, model_id, source, journal)
            sent(len(batch))

    def _send(self, batch: list[dict[str, Any]], model_id: str, source: str, journal: Journal) -> None:
        indexes = [f["index"] for f in batch]
        begun = not journal.begun.isdisjoint(indexes)
        doubt, settled = begun or not journal.empty, journal.opened + SETTLE_S if begun else 0.0
        for attempt in range(ATTEMPTS):
            try:
                todo = self._missing(batch, model_id, source, settled) if doubt else batch
                if todo:
                    journal.begin(indexes)
                    self._ask("POST", "feature/upload-batch", {"modelId": model_id, "source": source, "features": todo})
                journal.finish(indexes)
                return
            except Refused as e:
                raise Refused(f"features {indexes[0]} to {indexes[-1]}: {e}", e.status) from e
            except Unsure as e:
                if attempt == ATTEMPTS - 1:
                    raise Unsure(
                        f"features {indexes[0]} to {indexes[-1]} were not taken ({e}); they keep all rules, so see "
                        f"whether the source set of '{source}' is yours, and start again to go on",
                        over=e.over,
                    ) from e
                doubt, settled = True, settled if e.over else time.time() + SETTLE_S
                time.sleep(BACKOFF_S * 2**attempt)

    def _missing(self, batch: list[dict[str, Any]], model_id: str, source: str, settled: float) -> list[dict[str, Any]]:
        """What of a batch the server does not have, once no request can be at work on it any more (time `settled`)."""
        while True:
            found = (missing(f, self._there(f, model_id, source)) for f in batch)
            todo = [f for f in found if f is not None]
            left = settled - time.time()
            if not todo or left <= 0:
                return todo
            time.sleep(left)

    def _there(self, feature: dict[str, Any], model_id: str, source: str) -> dict[str, Any] | None:
        """What the server has of a feature, with all its activations."""
        row = self.feature(model_id, source, feature["index"])
        if row is None or len(row.get("activations") or ()) >= len(feature["activations"]):
            return row
        return {**row, "activations": self.activations(model_id, source, feature["index"])}


def missing(feature: dict[str, Any], there: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The part of a feature that must be sent given what the server has of it; None if nothing.

    Sending an index again changes nothing of its row and adds the activations and explanations that are sent. Raises
    UserError if what is there was not made from this feature.
    """
    if there is None:
        return feature
    key = lambda a: (tuple(a["tokens"]), tuple(map(float, a["values"])))
    have = Counter(key(a) for a in there.get("activations") or ())
    ours = [(key(a), a) for a in feature["activations"]]
    require(
        not have or any(k in have for k, _ in ours),
        f"feature {feature['index']} is there already with other activations, and Neuronpedia replaces none; "
        "use another --set_name",
    )
    todo = []
    for k, activation in ours:
        if have[k] > 0:
            have[k] -= 1
        else:
            todo.append(activation)
    if not todo:
        return None
    said = {e["description"] for e in there.get("explanations") or ()}
    left = [e for e in feature.get("explanations", ()) if e["text"] not in said]
    kept = {name: value for name, value in feature.items() if name != "explanations"}
    return {**kept, "activations": todo, **({"explanations": left} if left else {})}


class Journal:
    """What is known of an upload: a file of one json object a line, on disk before and after every request.

    done: indexes that the server has; begun: those it was sent. empty: the source set was not there when the journal
    was made (is_empty is asked then), so that what is not begun is not on the server. opened: when this process began.
    about: what is uploaded and where; the journal of another upload is refused, and so is a second process.
    """

    def __init__(self, path: str | Path, about: dict[str, str], is_empty: Callable[[], bool]):
        self.path, self.done, self.begun, self.opened = Path(path), set[int](), set[int](), time.time()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+", encoding="ascii")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._load(about, is_empty)
        except BlockingIOError as e:
            self._file.close()
            raise UserError(f"another process is uploading ('{path}' is in use); wait for it") from e
        except UserError:
            self._file.close()
            raise

    def _load(self, about: dict[str, str], is_empty: Callable[[], bool]) -> None:
        self._file.seek(0)
        text = self._file.read()
        whole = text[: text.rfind("\n") + 1]
        self._file.truncate(len(whole))  # a line torn by a kill
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError as e:
            raise UserError(
                f"'{self.path}' is damaged ({e}); delete it, and what is there already is looked up anew"
            ) from e
        if not lines:
            lines = [{"about": about, "empty": is_empty()}]
            self._write(lines[0])
        require(
            lines[0]["about"] == about,
            f"what is to be uploaded is no longer what '{self.path}' began with, and Neuronpedia replaces nothing; "
            "use another --set_name, or what it began with",
        )
        self.empty: bool = lines[0]["empty"]
        for line in lines[1:]:
            self.done.update(line.get("done", ()))
            self.begun.update(line.get("begin", ()))

    def begin(self, indexes: list[int]) -> None:
        """To be called before a request with these features."""
        self._write({"begin": indexes})
        self.begun.update(indexes)

    def finish(self, indexes: list[int]) -> None:
        """To be called once the server is known to have them."""
        self._write({"done": indexes})
        self.done.update(indexes)

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _check_density(threshold: float) -> None:
    require(threshold == -1 or 0 < threshold < 1, f"density_threshold={threshold}; -1 or 0..1 was wanted")


def _listed(features: Iterable[tuple[str, str, int, str]]) -> list[dict[str, Any]]:
    names = ("modelId", "layer", "index", "description")
    return [dict(zip(names, feature, strict=True)) for feature in features]
