"""The chat page: a small server for browsers on this machine, and the one thread in which the model writes.

All answers are written in turn, a token of each at a time, so a long one or a slow reader holds up no other. An answer
nobody waits for any more is dropped. The page itself is chat.html, chat.css and chat.js; nothing comes from elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import math
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae.chat.messages import Ask
from sae.config import UserError, build, require

if TYPE_CHECKING:
    from sae.chat.conversation import Conversation

MAX_BODY = 256 * 1024  # bytes of a request
BODY_SECONDS = 10  # that a request may take to arrive, its head and then its body
AT_ONCE = 8  # answers that are being written, a token of each in turn; the others wait
PAGES = {
    "/": ("chat.html", "text/html"), "/chat.css": ("chat.css", "text/css"), "/chat.js": ("chat.js", "text/javascript"),
}  # fmt: skip
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY", "Cache-Control": "no-store",
}  # fmt: skip


class Refused(Exception):
    """A request that is not served: a status and one sentence."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


@dataclass
class Job:
    """Work for the model: events (dicts) that go to `put` one by one, the last of which has `end` or `error`."""

    events: Iterator[dict[str, Any]]
    put: Callable[[dict[str, Any]], object]
    left: bool = False  # nobody waits for it any more
    brief: bool = False  # a single event: it goes before all answers


@dataclass
class Writer:
    """The thread that has the model: takes the next event of every job in turn."""

    max_waiting: int
    jobs: deque[Job] = field(default_factory=deque)
    wake: threading.Condition = field(default_factory=threading.Condition)
    closed: bool = False

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="writer", daemon=True)
        thread.start()
        return thread

    def add(self, job: Job) -> None:
        """Raises Refused where too many wait already."""
        with self.wake:
            if sum(not j.left for j in self.jobs) >= AT_ONCE + self.max_waiting:
                raise Refused(503, "too many answers are waiting to be written; try again in a moment")
            (self.jobs.appendleft if job.brief else self.jobs.append)(job)
            self.wake.notify()

    def close(self) -> None:
        with self.wake:
            self.closed = True
            self.wake.notify()

    def _run(self) -> None:
        active: deque[Job] = deque()
        while True:
            with self.wake:
                while not (self.closed or active or self.jobs):
                    self.wake.wait()
                if self.closed:
                    return
                while self.jobs and (self.jobs[0].brief or len(active) < AT_ONCE):
                    job = self.jobs.popleft()
                    (active.appendleft if job.brief else active.append)(job)
            job = active.popleft()
            if self._step(job):
                active.append(job)

    @staticmethod
    def _step(job: Job) -> bool:
        """Hand over a job's next event; whether there are more."""
        if job.left:
            return False
        try:
            event = next(job.events)
        except StopIteration:
            return False
        except UserError as e:
            event = {"error": str(e)}
        except Exception as e:  # noqa: BLE001  one broken answer must not end all the others
            event = {"error": f"the model failed ({type(e).__name__}: {(str(e).splitlines() or [''])[0]})"}
        job.put(event)
        return not {"error", "end"} & event.keys()


# --------------------------------------------------------------------------------------------------
# what the model is asked


def answer(chat: Conversation, ask: Ask) -> Iterator[dict[str, Any]]:
    """The events of an answer: the prompt, every token, the end with the whole text."""
    prompt: list[dict[str, Any]] = []
    ids: list[int] = []
    for token in chat.stream(ask):
        if token.prompt:
            prompt.append(token.to_dict())
            continue
        if not ids:
            yield {"prompt": prompt}
        ids.append(token.id)
        yield {"token": token.to_dict()}
    yield {"end": "length" if len(ids) == ask.max_new_tokens else "done", "text": chat.lm.tokenizer.decode(ids)}


def explanation(chat: Conversation, ask: Ask, token: int, ids: list[int]) -> Iterator[dict[str, Any]]:
    """Why the last of the answer's ids is this token."""
    yield {"end": "done", **chat.explain(ask, token, ids, place=max(0, len(ids) - 1))}


def feature(chat: Conversation, name: str, latent: int) -> Iterator[dict[str, Any]]:
    """What is known of a latent: its record, and the tokens its direction leads to."""
    assert chat.live is not None
    sae = chat.live.saes[chat.live.name_of(name, latent)]
    record = chat.notes[name].record(latent)
    ends = dict(zip(("promoted", "suppressed"), chat.tokens_of(sae.W_dec[latent].detach()), strict=True))
    ends = {key: record.get(key) or tokens for key, tokens in ends.items()}
    yield {"end": "done", **record, **ends, "latent": latent, "sae": name}


def about(chat: Conversation, folders: Mapping[str, Path], most_tokens: int, start: Ask) -> dict[str, Any]:
    """What the page must know to begin."""
    saes = [
        {
            "name": name, "n_latents": len(notes.largest), "labels": bool(notes.labels),
            "largest": [float(f"{x:.3g}") for x in notes.largest.tolist()] if notes.path.is_file() else None,
            "pages": f"/dashboards/{i}/index.html" if (folders[name] / "index.html").is_file() else None,
        }
        for i, (name, notes) in enumerate(chat.notes.items())
    ]  # fmt: skip
    kept = {k: v for k, v in vars(start).items() if k != "messages"}
    return {"model": chat.lm.name, "saes": saes, "max_new_tokens": most_tokens, "settings": kept}


# --------------------------------------------------------------------------------------------------
# requests


def check_origin(headers: Mapping[str, str], hosts: Callable[[str], bool]) -> None:
    """Only pages of this server may talk to it: a foreign one could be open in the same browser, or have a name that
    was made to point here. Raises Refused."""
    host = headers.get("host", "")
    if not hosts(host):
        raise Refused(421, f"this server does not go by '{host[:100]}'; open the address that it printed")
    origin = headers.get("origin")
    if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
        raise Refused(403, f"pages of '{origin[:100]}' may not talk to this server")
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise Refused(403, "pages of other servers may not talk to this one")


def hosts_of(host: str, port: int) -> Callable[[str], bool]:
    """Whether a Host header names a server that listens at host:port."""
    names = {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host, socket.gethostname().lower()}

    def known(header: str) -> bool:
        name, _, number = header.lower().rpartition(":")
        if not name or number != str(port):
            return False
        if name in names:
            return True
        if host not in ("0.0.0.0", "::"):
            return False
        try:  # listening everywhere: by any address, but not by any name
            return bool(ipaddress.ip_address(name.strip("[]")))
        except ValueError:
            return False

    return known


async def read_json(request: Any) -> Any:
    """A request's body. Raises Refused."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise Refused(415, "content-type application/json was wanted")
    too_much = Refused(413, f"a request may have {MAX_BODY:,} bytes")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > MAX_BODY:
        raise too_much
    try:
        body = await asyncio.wait_for(_body(request, too_much), BODY_SECONDS)
    except asyncio.TimeoutError as e:  # not TimeoutError in Python 3.10
        raise Refused(408, f"the request took longer than {BODY_SECONDS} s to arrive") from e
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as e:
        raise Refused(400, "the request is not valid json") from e


async def _body(request: Any, too_much: Refused) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise too_much
    return body


class Events:
    """A response that hands on a job's events, a json object a line, and lets the job go when the client has gone."""

    def __init__(self, writer: Writer, events: Iterator[dict[str, Any]], *, brief: bool = False):
        self.queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()  # an answer has a largest length, and so has this
        loop = asyncio.get_running_loop()
        self.job = Job(events, lambda event: loop.call_soon_threadsafe(self.queue.put_nowait, event), brief=brief)
        writer.add(self.job)

    async def __call__(self, _: Any, receive: Any, send: Any) -> None:
        tasks = [asyncio.create_task(self._send(send)), asyncio.create_task(self._gone(receive))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.job.left = True
            for task in tasks:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, OSError):
                    await task

    async def _send(self, send: Any) -> None:
        headers = [(k.lower().encode(), v.encode()) for k, v in HEADERS.items()]
        headers.append((b"content-type", b"application/x-ndjson"))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        done = False
        while not done:
            events = [await self.queue.get()]
            while not self.queue.empty():
                events.append(self.queue.get_nowait())
            done = bool({"error", "end"} & events[-1].keys())
            body = "".join(json.dumps(clean(event), allow_nan=False) + "\n" for event in events).encode()
            await send({"type": "http.response.body", "body": body, "more_body": not done})

    @staticmethod
    async def _gone(receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass


def clean(value: Any) -> Any:
    """NaN and infinity, which json does not know, become null."""
    if isinstance(value, dict):
        return {k: clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --------------------------------------------------------------------------------------------------
# the server


class App:
    """The ASGI application. folders: where each SAE's notes and pages lie; start: the settings a page begins with."""

    def __init__(
        self, chat: Conversation, folders: Mapping[str, Path], start: Ask, writer: Writer,
        hosts: Callable[[str], bool], most_tokens: int,
    ):  # fmt: skip
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Mount, Route
        from starlette.staticfiles import StaticFiles

        self.chat, self.folders, self.start, self.writer = chat, folders, start, writer
        self.hosts, self.most_tokens = hosts, most_tokens
        self.begins = clean(about(chat, folders, most_tokens, start))
        routes: list[Any] = [Route(path, self.page) for path in PAGES]
        routes += [Route("/api/about", self.about), Route("/api/search", self.search)]
        routes += [Route("/api/feature", self.feature), Route("/api/talk", self.talk, methods=["POST"])]
        routes += [Route("/api/explain", self.explain, methods=["POST"])]
        for i, folder in enumerate(folders.values()):
            if (folder / "index.html").is_file():  # they have a policy of their own
                routes.append(Mount(f"/dashboards/{i}", StaticFiles(directory=folder)))
        handlers: dict[Any, Any] = {
            Refused: lambda _, e: refusal(e.status, str(e)), UserError: lambda _, e: refusal(400, str(e)),
            HTTPException: lambda _, e: refusal(e.status_code, str(e.detail)),
        }  # fmt: skip
        self.inner = Starlette(routes=routes, exception_handlers=handlers)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        try:
            check_origin({k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}, self.hosts)
        except Refused as e:
            await refusal(e.status, str(e))(scope, receive, send)
            return
        await self.inner(scope, receive, send)

    async def page(self, request: Any) -> Any:
        from starlette.responses import FileResponse

        name, kind = PAGES[request.url.path]
        return FileResponse(Path(__file__).with_name(name), media_type=kind, headers=HEADERS)

    async def about(self, _: Any) -> Any:
        return as_json(self.begins)

    async def talk(self, request: Any) -> Any:
        ask = self._question(await read_json(request))
        if self.chat.live is not None:
            self.chat.live.steering(*ask.steer, stop=ask.stop)  # raises for an edit that cannot be
        return Events(self.writer, answer(self.chat, ask))

    async def explain(self, request: Any) -> Any:
        value = await read_json(request)
        value = value if isinstance(value, dict) else {}
        token, ids = value.get("token"), value.get("ids")
        if type(token) is not int or not isinstance(ids, list) or len(ids) > self.most_tokens:
            raise Refused(400, "a token's id, the answer's ids up to it and its question were wanted")
        n, ask = self.chat.lm.tokenizer.vocab_size, self._question(value.get("ask"))
        require(all(type(i) is int and 0 <= i < n for i in (token, *ids)), f"a token is a number from 0 to {n - 1}")
        return Events(self.writer, explanation(self.chat, ask, token, ids), brief=True)

    async def feature(self, request: Any) -> Any:
        name, latent = self._sae(request), request.query_params.get("latent", "")
        n = len(self.chat.notes[name].largest)
        good = latent.isascii() and latent.isdigit() and len(latent) < 12 and int(latent) < n
        require(good, f"latents are numbered 0 to {n - 1}")
        return Events(self.writer, feature(self.chat, name, int(latent)), brief=True)

    async def search(self, request: Any) -> Any:
        notes = self.chat.notes[self._sae(request)]
        found = notes.search(request.query_params.get("words", "")[:200], 50)
        return as_json([{"latent": i, "label": notes.labels.get(i, "")} for i in found])

    def _question(self, value: Any) -> Ask:
        require(isinstance(value, dict) and "messages" in value, "a json object with messages was wanted")
        ask, most = build(Ask, value), self.most_tokens
        require(ask.max_new_tokens <= most, f"max_new_tokens={ask.max_new_tokens}; at most {most} are written here")
        return ask

    def _sae(self, request: Any) -> str:
        name = request.query_params.get("sae")
        require(name in self.chat.notes, "no SAE of that name takes part")
        return name


def as_json(value: Any, status: int = 200, **headers: str) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(clean(value), status_code=status, headers={**HEADERS, **headers})


def refusal(status: int, why: str) -> Any:
    return as_json({"error": why}, status, **({"Retry-After": "2"} if status == 503 else {}))


def patient_for_a_while() -> type:
    """uvicorn's protocol, which would wait for the rest of a request's head for ever, with an end to that."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Protocol(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(BODY_SECONDS, self._look, None)

        def _look(self, last: Any) -> None:
            """Close where no request has come since the last look, at which `last` was the newest."""
            if self.cycle is last and (last is None or last.response_complete):
                self.transport.close()
            elif not self.transport.is_closing():
                self.loop.call_later(BODY_SECONDS, self._look, self.cycle)

    return Protocol


def serve(
    chat: Conversation, folders: Mapping[str, Path], start: Ask, *, host: str, port: int, max_waiting: int,
    say: Callable[[str], object], most_tokens: int = 1024,
) -> None:  # fmt: skip
    """Listen until interrupted. say: told the address once it is open. Raises UserError where that cannot be."""
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as e:
        raise UserError("the page needs a small web server; run: pip install 'nanosae[web]'") from e
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as e:
        raise UserError(f"cannot listen at {host}:{port} ({e.strerror or e}); choose another --port or --host") from e
    port = listener.getsockname()[1]
    writer = Writer(max_waiting)
    writer.start()
    app = App(chat, folders, start, writer, hosts_of(host, port), most_tokens)
    config = uvicorn.Config(
        app, log_level="error", access_log=False, server_header=False, timeout_keep_alive=5, limit_concurrency=512,
        timeout_graceful_shutdown=2, lifespan="off", http=patient_for_a_while(), ws="none",
    )  # fmt: skip
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    say(f"open http://{shown}:{port}  (Ctrl-C ends)")
    try:
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        writer.close()
        listener.close()
