"""The chat page: a small server for browsers on this machine, and the one thread in which the model writes.

All answers are written in turn, one token of each at a time, so a long answer or a slow reader delays no other. An
answer whose client has left is dropped. The page is chat.html, chat.css and chat.js; nothing comes from elsewhere.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sae import log
from sae.chat.conversation import Conversation
from sae.chat.messages import Ask
from sae.config import UserError, build, require
from sae.files import without_nan

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.responses import FileResponse, JSONResponse, StreamingResponse
    from starlette.routing import Mount, Route
    from starlette.staticfiles import StaticFiles
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as e:
    raise UserError("the page needs a small web server; run: pip install 'nanosae[web]'") from e

MAX_BODY = 256 * 1024  # bytes of a request
BODY_SECONDS = 10  # for the head of a request to arrive, and again for its body
AT_ONCE = 8  # answers that are written at the same time, in turn; the others wait
PAGES = {"/": "chat.html", "/chat.css": "chat.css", "/chat.js": "chat.js"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}
Event = dict[str, Any]  # a line of json for the page; the last one of a job has `end` or `error`


@dataclass
class Job:
    """Work for the model: its events go to `put` one by one."""

    events: Iterator[Event]
    put: Callable[[Event], object]
    left: bool = False  # nobody waits for it any more
    brief: bool = False  # a single event: it goes before all answers


@dataclass
class Writer:
    """The thread that has the model. It writes the first AT_ONCE jobs in turn, one event of each at a time."""

    max_waiting: int
    jobs: deque[Job] = field(default_factory=deque)
    wake: threading.Condition = field(default_factory=threading.Condition)
    closed: bool = False

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="writer", daemon=True)
        thread.start()
        return thread

    def add(self, job: Job) -> None:
        """Raises a 503 if too many jobs wait already."""
        with self.wake:
            if sum(not j.left for j in self.jobs) >= AT_ONCE + self.max_waiting:
                raise HTTPException(503, "too many answers are waiting to be written; try again in a moment")
            (self.jobs.appendleft if job.brief else self.jobs.append)(job)
            self.wake.notify()

    def close(self) -> None:
        with self.wake:
            self.closed = True
            self.wake.notify()

    def _run(self) -> None:
        while True:
            with self.wake:
                self.wake.wait_for(lambda: self.closed or self.jobs)
                if self.closed:
                    return
                job = self.jobs.popleft()
            event = None if job.left else _next_event(job.events)
            if event is None:
                continue
            job.put(event)
            if not _is_last(event):
                with self.wake:
                    self.jobs.insert(AT_ONCE - 1, job)  # the last of those being written


def _next_event(events: Iterator[Event]) -> Event | None:
    try:
        return next(events, None)
    except UserError as e:
        return {"error": str(e)}
    except Exception as e:  # noqa: BLE001  one broken answer must not end all the others
        return {"error": f"the model failed ({type(e).__name__}: {(str(e).splitlines() or [''])[0]})"}


def _is_last(event: Event) -> bool:
    return bool({"error", "end"} & event.keys())


# --------------------------------------------------------------------------------------------------
# jobs


def answer(chat: Conversation, ask: Ask) -> Iterator[Event]:
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


def once(find: Callable[[], dict[str, Any]]) -> Iterator[Event]:
    """A single event, found in the writer's thread."""
    yield {"end": "done", **find()}


def known_of(chat: Conversation, name: str, latent: int) -> dict[str, Any]:
    """What is known of a latent: its record, and the tokens whose logits its direction moves most."""
    record = chat.notes[name].record(latent)
    ends = dict(zip(("promoted", "suppressed"), chat.tokens_of(name, latent), strict=True))
    return {**record, **{key: record.get(key) or found for key, found in ends.items()}, "latent": latent, "sae": name}


def about(chat: Conversation, most_tokens: int, start: Ask) -> dict[str, Any]:
    """What the page must know to begin."""
    saes = [
        {
            "name": name,
            "n_latents": len(notes.largest),
            "labels": bool(notes.labels),
            "largest": [float(f"{x:.3g}") for x in notes.largest.tolist()] if notes.path.is_file() else None,
            "pages": f"/dashboards/{i}/index.html" if (notes.folder / "index.html").is_file() else None,
        }
        for i, (name, notes) in enumerate(chat.notes.items())
    ]
    kept = {k: v for k, v in vars(start).items() if k != "messages"}
    return {"model": chat.lm.name, "saes": saes, "max_new_tokens": most_tokens, "settings": kept}


# --------------------------------------------------------------------------------------------------
# requests and responses


def check_origin(headers: Mapping[str, str], hosts: Callable[[str], bool]) -> None:
    """Only pages of this server may talk to it: a foreign page could be open in the same browser, or have a name that
    was made to point here. Raises HTTPException."""
    host, origin = headers.get("host", ""), headers.get("origin")
    if not hosts(host):
        raise HTTPException(421, f"this server does not go by '{host[:100]}'; open the address that it printed")
    if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
        raise HTTPException(403, f"pages of '{origin[:100]}' may not talk to this server")
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise HTTPException(403, "pages of other servers may not talk to this one")


def hosts_of(host: str, port: int) -> Callable[[str], bool]:
    """Whether a Host header names a server that listens at host:port."""
    names = {"localhost", "127.0.0.1", "[::1]", f"[{host}]" if ":" in host else host, socket.gethostname().lower()}

    def known(header: str) -> bool:
        name, _, number = header.lower().rpartition(":")
        if number != str(port) or name in names or host not in ("0.0.0.0", "::"):
            return number == str(port) and name in names
        try:  # listening everywhere: any address is this server, a name need not be
            return bool(ipaddress.ip_address(name.strip("[]")))
        except ValueError:
            return False

    return known


async def read_json(request: Request) -> Any:
    """A request's body. Raises HTTPException."""
    if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
        raise HTTPException(415, "the content-type must be application/json")
    try:
        return json.loads(await asyncio.wait_for(_body(request), BODY_SECONDS))
    except asyncio.TimeoutError as e:  # not TimeoutError in Python 3.10
        raise HTTPException(408, f"the request took longer than {BODY_SECONDS} s to arrive") from e
    except (ValueError, RecursionError) as e:
        raise HTTPException(400, "the request is not valid json") from e


async def _body(request: Request) -> bytes:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"a request may have {MAX_BODY:,} bytes")
    return body


class Events(StreamingResponse):
    """A job's events, a json object a line. When the client leaves, so does the job."""

    def __init__(self, writer: Writer, events: Iterator[Event], *, brief: bool = False):
        queue: asyncio.Queue[Event] = asyncio.Queue()  # bounded, as an answer is
        loop = asyncio.get_running_loop()
        self.job = Job(events, lambda event: loop.call_soon_threadsafe(queue.put_nowait, event), brief=brief)
        writer.add(self.job)
        super().__init__(self._lines(queue), headers=HEADERS, media_type="application/x-ndjson")

    @staticmethod
    async def _lines(queue: asyncio.Queue[Event]) -> AsyncIterator[str]:
        event: Event = {}
        while not _is_last(event):
            event = await queue.get()
            yield json.dumps(without_nan(event), allow_nan=False) + "\n"

    async def __call__(self, *asgi: Any) -> None:
        try:
            await super().__call__(*asgi)
        finally:
            self.job.left = True


def as_json(value: Any, status: int = 200, **headers: str) -> JSONResponse:
    return JSONResponse(without_nan(value), status_code=status, headers={**HEADERS, **headers})


def refusal(_: Any, e: Exception) -> JSONResponse:
    """An error as the page gets it: a status and one sentence."""
    status, why = (e.status_code, e.detail) if isinstance(e, HTTPException) else (400, str(e))
    return as_json({"error": why}, status, **({"Retry-After": "2"} if status == 503 else {}))


# --------------------------------------------------------------------------------------------------
# the server


class App:
    """The ASGI application. start: the settings a page begins with; hosts: which Host headers mean this server."""

    def __init__(self, chat: Conversation, start: Ask, writer: Writer, hosts: Callable[[str], bool]):
        self.chat, self.writer, self.hosts = chat, writer, hosts
        self.most_tokens = max(1024, start.max_new_tokens)
        begins = about(chat, self.most_tokens, start)
        routes: list[Any] = [Route(path, self.page) for path in PAGES]
        routes += [Route("/api/about", lambda _: as_json(begins))]
        routes += [Route("/api/search", self.search), Route("/api/feature", self.feature)]
        routes += [Route(f"/api/{f.__name__}", f, methods=["POST"]) for f in (self.talk, self.explain)]
        for i, notes in enumerate(chat.notes.values()):
            if (notes.folder / "index.html").is_file():  # these pages have a policy of their own
                routes.append(Mount(f"/dashboards/{i}", StaticFiles(directory=notes.folder)))
        self.inner = Starlette(routes=routes, exception_handlers={HTTPException: refusal, UserError: refusal})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            check_origin({k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}, self.hosts)
        except HTTPException as e:
            await refusal(None, e)(scope, receive, send)
            return
        await self.inner(scope, receive, send)

    async def page(self, request: Request) -> FileResponse:
        return FileResponse(Path(__file__).with_name(PAGES[request.url.path]), headers=HEADERS)

    async def talk(self, request: Request) -> Events:
        ask = self._question(await read_json(request))
        if self.chat.live is not None:
            self.chat.live.steer(*ask.steer, stop=ask.stop)  # raises UserError for an impossible edit
        return Events(self.writer, answer(self.chat, ask))

    async def explain(self, request: Request) -> Events:
        value = await read_json(request)
        value = value if isinstance(value, dict) else {}
        token, ids = value.get("token"), value.get("ids")
        if type(token) is not int or not isinstance(ids, list) or len(ids) > self.most_tokens:
            raise UserError("expected a token's id, the answer's ids up to it and its question")
        n, ask = self.chat.lm.tokenizer.vocab_size, self._question(value.get("ask"))
        require(all(type(i) is int and 0 <= i < n for i in (token, *ids)), f"a token is a number from 0 to {n - 1}")
        why = lambda: self.chat.explain(ask, token, ids, place=max(0, len(ids) - 1))
        return Events(self.writer, once(why), brief=True)

    async def feature(self, request: Request) -> Events:
        name, latent = self._sae(request), request.query_params.get("latent", "")
        n = len(self.chat.notes[name].largest)
        good = latent.isascii() and latent.isdigit() and len(latent) < 12 and int(latent) < n
        require(good, f"latents are numbered 0 to {n - 1}")
        return Events(self.writer, once(lambda: known_of(self.chat, name, int(latent))), brief=True)

    async def search(self, request: Request) -> JSONResponse:
        notes = self.chat.notes[self._sae(request)]
        found = notes.search(request.query_params.get("words", "")[:200], 50)
        return as_json([{"latent": i, "label": notes.labels.get(i, "")} for i in found])

    def _question(self, value: Any) -> Ask:
        require(isinstance(value, dict) and "messages" in value, "expected a json object with messages")
        ask, most = build(Ask, value), self.most_tokens
        require(ask.max_new_tokens <= most, f"max_new_tokens={ask.max_new_tokens}; at most {most} are written here")
        return ask

    def _sae(self, request: Request) -> str:
        name = request.query_params.get("sae", "")
        require(name in self.chat.notes, "no SAE of that name takes part")
        return name


class Protocol(H11Protocol):
    """uvicorn's protocol, which would wait for ever for the rest of a request's head, with a limit on that."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(BODY_SECONDS, self._look, None)

    def _look(self, last: Any) -> None:
        """Close the connection if no request has come since the last look, when `last` was the newest."""
        if self.cycle is last and (last is None or last.response_complete):
            self.transport.close()
        elif not self.transport.is_closing():
            self.loop.call_later(BODY_SECONDS, self._look, self.cycle)


def serve(chat: Conversation, start: Ask, *, host: str, port: int, max_waiting: int) -> None:
    """Listen until interrupted, and say the address. Raises UserError if the address cannot be had."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as e:
        raise UserError(f"cannot listen at {host}:{port} ({e.strerror or e}); choose another --port or --host") from e
    port = listener.getsockname()[1]
    writer = Writer(max_waiting)
    writer.start()
    app = App(chat, start, writer, hosts_of(host, port))
    quiet: Any = {"log_level": "error", "access_log": False, "server_header": False, "lifespan": "off", "ws": "none"}
    limits: Any = {"timeout_keep_alive": 5, "limit_concurrency": 512, "timeout_graceful_shutdown": 2}
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    log.say(f"open http://{shown}:{port}  (Ctrl-C ends)")
    try:
        uvicorn.Server(uvicorn.Config(app, http=Protocol, **quiet, **limits)).run(sockets=[listener])
    finally:
        writer.close()
        listener.close()
