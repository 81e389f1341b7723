"""NeuronpediaClient: Neuronpedia's web API, and resumable uploads without duplicates or gaps.

The server adds the activations of a request again when it is sent again. So the fate of an unanswered request is looked
up before anything is repeated, and a journal beside the features remembers what was sent and what is known to be there.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import requests

from sae import files, log
from sae.config import UserError, require
from sae.pages.neuronpedia_format import MAX_FEATURES, batches, check_model, check_set, json_bytes

API_BASE = "https://www.neuronpedia.org/api"
KEY = "NEURONPEDIA_API_KEY"
ATTEMPTS = 6
BACKOFF_S = 1.0  # doubled from attempt to attempt
LIMIT_WAIT_S = 15.0  # the same after HTTP 429, whose window is 60 minutes
SETTLE_S = 60.0  # a request that was sent or lost may still be at work on the server for so long
Json = dict[str, Any]


class Rejected(UserError):
    """The server said no, and will say so again. status: its HTTP status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Unsure(UserError):
    """It is unknown whether the server did what it was asked. over: it is not doing it now."""

    def __init__(self, message: str, *, over: bool):
        super().__init__(message)
        self.over = over


def _repeated(ask: Callable[[], Any], attempts: int = ATTEMPTS) -> Any:
    """The answer to a request that may be repeated while the server gives none, with growing waits."""
    for attempt in range(attempts - 1):
        try:
            return ask()
        except Unsure:
            time.sleep(BACKOFF_S * 2**attempt)
    return ask()


class NeuronpediaClient:
    """Neuronpedia's API, at neuronpedia.org or a local one (api_base="http://localhost:3000/api").

    api_key: for requests that need one; never kept or shown. timeout: seconds of silence until a request counts as
    unanswered. Requests that only read are repeated after faults, and all of them after HTTP 429, with growing waits.
    Raises UserError for arguments that the server would refuse, Rejected if it refuses, Unsure if it does not answer.
    Model and source ids are those in its addresses: `gpt2-small`, `9-res-jb`.
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

    def _ask(self, method: str, path: str, body: Json | None = None) -> Any:
        """One request and its answer. Waits out the rate limit; repeats nothing else."""
        data, url = None if body is None else json_bytes(body), f"{self.api_base}/{path}"
        headers = None if data is None else {"Content-Type": "application/json"}
        # a redirect would take the key to another host
        how: Json = {"data": data, "headers": headers, "timeout": (10, self.timeout), "allow_redirects": False}
        for attempt in range(ATTEMPTS * 2):
            try:
                answer = self._session.request(method, url, **how)
            except requests.RequestException as e:
                raise Unsure(f"no answer from {url} ({type(e).__name__})", over=False) from e
            if answer.status_code != 429:
                return self._read(answer, url)
            told = answer.headers.get("Retry-After", "")
            wait = float(told) if told.replace(".", "", 1).isdigit() else min(600, LIMIT_WAIT_S * 2**attempt)
            if wait > 1:
                log.say(f"the rate limit of {path} is reached; going on in {wait:.0f} s")
            time.sleep(wait)
        raise Rejected(f"the rate limit of {url} is still reached; try again in an hour", 429)

    def _read(self, answer: requests.Response, url: str) -> Any:
        status = answer.status_code
        try:
            content = answer.json()
        except ValueError:
            content = None
        if status == 200:
            if content is None and answer.text.strip() != "null":
                raise Unsure(f"{url} answered with no json; is that the API's address?", over=True)
            return content
        said = (content.get("error") or content.get("message")) if isinstance(content, dict) else None
        said = said or answer.reason
        if 300 <= status < 400:
            elsewhere = answer.headers.get("Location")
            raise Rejected(f"{self.api_base} sends requests on to '{elsewhere}'; give that host as --api_base", status)
        if status == 401:
            raise Rejected(
                f"{self.api_base} does not take the key; set {KEY} to the one in the site's settings", status
            )
        if status >= 500:
            raise Unsure(f"{url} failed (HTTP {status}: {said})", over=status == 500)
        raise Rejected(f"{url} refused (HTTP {status}: {said})", status)

    def _look(self, method: str, path: str, body: Json | None = None) -> Any:
        """A request that only reads, and so may be repeated. None for what does not exist."""
        try:
            return _repeated(lambda: self._ask(method, path, body))
        except Rejected as e:
            if e.status == 404:
                return None
            raise

    def model_new(self, model_id: str, layers: int) -> None:
        """Create an unlisted model. Rejected if it exists."""
        check_model(model_id, layers)
        self._ask("POST", "model/new", {"id": model_id, "layers": layers})

    def source_set_new(self, model_id: str, name: str) -> None:
        """Create a source set, with a source `{layer}-{name}` for each layer of the model. Rejected if it exists."""
        check_set(name)
        self._ask("POST", "source-set/new", {"modelId": model_id, "name": name})

    def source_set(self, model_id: str, name: str) -> Json | None:
        return self._look("GET", f"source-set/{quote(model_id)}/{quote(name)}")

    def feature(self, model_id: str, source: str, index: int) -> Json | None:
        """A feature with its activations and explanations; None if it is not there. Needs no key."""
        return self._look("GET", f"feature/{quote(model_id)}/{quote(source)}/{index}")

    def page(self, model_id: str, source: str, index: int) -> str:
        """The address of a feature's page."""
        return f"{self.api_base.removesuffix('/api')}/{model_id}/{source}/{index}"

    def activations(self, model_id: str, source: str, index: int) -> list[Json]:
        """The stored activations of a feature."""
        return self._look("POST", "activation/get", {"modelId": model_id, "source": source, "index": str(index)})

    def create(self, model_id: str, layers: int, set_name: str) -> None:
        """Create the model and the source set, unless they exist."""
        for new in (lambda: self.model_new(model_id, layers), lambda: self.source_set_new(model_id, set_name)):
            try:
                _repeated(new, 3)  # the server allows 5 models an hour
            except Rejected as e:  # as the second of two attempts is, where the first one worked
                if "already exists" not in str(e):
                    raise

    def upload(
        self,
        features: Iterable[Json],
        model_id: str,
        source: str,
        journal: Journal,
        *,
        batch_size: int = MAX_FEATURES,
        sent: Callable[[int], Any] = lambda _: None,
    ) -> None:
        """Upload features (from neuronpedia_format.to_feature) to a source of your own, every activation exactly once.

        The source set must exist. journal: what is known of earlier uploads to it; after a kill at any moment, the same
        call continues. sent(n) is called when n more features are known to be there.
        """
        require(1 <= batch_size <= MAX_FEATURES, f"batch_size={batch_size}; 1 to {MAX_FEATURES} were wanted")

        for batch in batches(features, batch_size):
            new = [f for f in batch if f["index"] not in journal.done]
            if new:
                self._send(new, model_id, source, journal)
            sent(len(batch))

    def _send(self, batch: list[Json], model_id: str, source: str, journal: Journal) -> None:
        indexes = [f["index"] for f in batch]
        which = f"features {indexes[0]} to {indexes[-1]}"
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
            except Rejected as e:
                raise Rejected(f"{which}: {e}", e.status) from e
            except Unsure as e:
                if attempt == ATTEMPTS - 1:
                    failed = f"upload of {which} failed ({e}) though they are valid"
                    raise Unsure(f"{failed}; is the source set of '{source}' yours?", over=e.over) from e
                doubt, settled = True, settled if e.over else time.time() + SETTLE_S
                time.sleep(BACKOFF_S * 2**attempt)

    def _missing(self, batch: list[Json], model_id: str, source: str, settled: float) -> list[Json]:
        """What the server lacks of a batch at the time `settled`, when no request can be at work on it any more."""
        while True:
            found = (missing(f, self._there(f, model_id, source)) for f in batch)
            todo, left = [f for f in found if f is not None], settled - time.time()
            if not todo or left <= 0:
                return todo
            time.sleep(left)

    def _there(self, feature: Json, model_id: str, source: str) -> Json | None:
        """A feature on the server, with all its activations."""
        row = self.feature(model_id, source, feature["index"])
        if row is None or len(row.get("activations") or ()) >= len(feature["activations"]):
            return row
        return {**row, "activations": self.activations(model_id, source, feature["index"])}


def missing(feature: Json, there: Mapping[str, Any] | None) -> Json | None:
    """The part of a feature that the server lacks; None if nothing. there: the feature on the server.

    Sending an index again leaves its row unchanged and adds the activations and explanations sent. Raises UserError if
    what is there was not made from this feature.
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
        if have[k] <= 0:
            todo.append(activation)
        have[k] -= 1
    if not todo:
        return None
    said = {e["description"] for e in there.get("explanations") or ()}
    left = [e for e in feature.get("explanations", ()) if e["text"] not in said]
    kept = {name: value for name, value in feature.items() if name != "explanations"}
    return {**kept, "activations": todo, **({"explanations": left} if left else {})}


class Journal:
    """What is known of an upload: json lines, on disk before and after every request.

    done: indexes known to be on the server; begun: indexes sent. empty: the source set did not exist when the journal
    was made (is_empty() is asked then), so that only what is begun can be there. opened: when this process began.
    about: what is uploaded, and to what source; a journal of another upload is refused, and so is a second process.
    """

    def __init__(self, path: str | Path, about: dict[str, str], is_empty: Callable[[], bool]):
        self.path, self.done, self.begun, self.opened = Path(path), set[int](), set[int](), time.time()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self._held = files.lock(self.path, f"another process is uploading ('{path}' is in use); wait for it")
        try:
            lines = files.open_journal(self.path, todo="delete it: the server is then asked what it has")
            if not lines:
                lines = [{"about": about, "empty": is_empty()}]
                files.append_line(self.path, lines[0])
            foreign = f"'{path}' is of another upload, and Neuronpedia replaces nothing; use another --set_name"
            require(lines[0]["about"] == about, foreign)
        except UserError:
            os.close(self._held)
            raise
        self.empty: bool = lines[0]["empty"]
        for line in lines[1:]:
            self.done.update(line.get("done", ()))
            self.begun.update(line.get("begin", ()))

    def begin(self, indexes: list[int]) -> None:
        """Call it before a request with these features."""
        files.append_line(self.path, {"begin": indexes})
        self.begun.update(indexes)

    def finish(self, indexes: list[int]) -> None:
        """Call it once they are known to be on the server."""
        files.append_line(self.path, {"done": indexes})
        self.done.update(indexes)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._held)
