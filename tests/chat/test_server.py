"""The chat page in a real browser, with the real pygpt and a trained SAE; and the server against the rude.

Run: python -m pytest tests/chat/test_server.py      (screenshots land in test_output/)
"""

import asyncio
import contextlib
import http.client
import importlib
import json
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
from playwright.sync_api import expect
from starlette.exceptions import HTTPException

from benchmarks.bench_server import ask, memory_mb, question, server, storm
from model import GPT, GPTConfig, save_atomic
from sae.chat import server as page_server
from sae.chat.conversation import Ask
from sae.chat.server import Job, Writer, hosts_of, serve
from sae.config import SAEConfig, UserError
from sae.formats.store import save_sae
from sae.models import create_sae
from tests.chat.test_conversation import record
from tests.conftest import ROOT
from tokenizer import CHAT_TOKENS, BPETokenizer

OUTPUT = ROOT / "test_output"
HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "</textarea><b>bold", "\u202e</span>"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """pygpt's layer 10, trained shortly; its features noted, some with hostile labels, and with a page."""
    folder = tmp_path_factory.mktemp("runs")
    size = ["--k", "16", "--expansion_factor", "4", "--lr", "3e-3"]
    text = ["--max_tokens", "30000", "--val_tokens", "1000", "--buffer_tokens", "8192"]
    command = [sys.executable, "-m", "scripts.sae_train", "--layer", "10", *size, *text, "--save_dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = folder / "layer_10"
    features = folder / "features"
    features.mkdir()
    labels = [f"{HOSTILE[i % 4]} {i}" if i % 5 == 0 else f"label {i}" for i in range(768)]
    lines = (
        json.dumps({**record(i, label, 10.0), "histogram": {"edges": [1, 2, 4], "counts": [5, 2]}})
        for i, label in enumerate(labels)
    )
    (features / "features.jsonl").write_text("\n".join(lines) + "\n")
    (features / "index.html").write_text("<title>dashboard</title>the dashboard")
    return folder


@pytest.fixture(scope="module")
def pygpt(run):
    """(port, pid) of a real server."""
    with server("--sae_path", str(run), "--max_new_tokens", "24") as (port, pid):
        yield port, pid


@pytest.fixture(scope="module")
def half_requests(pygpt):
    """Connections of clients that never finish the head of their first, or second, request."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(socket.create_connection(("127.0.0.1", pygpt[0]), 60)) for _ in range(3)]
        opened[1].sendall(b"GET / HTT")
        opened[2].sendall(f"GET /api/none HTTP/1.1\r\nHost: 127.0.0.1:{pygpt[0]}\r\n\r\n".encode())
        answer = b""
        while not answer.endswith(b'"Not Found"}'):  # head and body may come apart
            answer += opened[2].recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 404")
        opened[2].sendall(b"GET / HTT")
        yield opened


@pytest.fixture
def open_page(browser):
    """Opens a page that remembers its errors, dialogs and requests, and must have had no errors at the end."""
    pages = []

    def open_one(port, scheme="light", width=1360, height=860):
        page = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme).new_page()
        page.wrong, page.requests = [], []
        page.on("console", lambda m: page.wrong.append(m.text))
        page.on("pageerror", lambda e: page.wrong.append(str(e)))
        page.on("dialog", lambda d: (page.wrong.append(d.message), d.dismiss()))
        page.on("request", lambda r: page.requests.append(r.url))
        page.goto(f"http://127.0.0.1:{port}/")
        page.set_default_timeout(30_000)
        pages.append((page, port))
        return page

    yield open_one
    for page, port in pages:
        assert page.wrong == []
        assert all(url.startswith((f"http://127.0.0.1:{port}/", "data:")) for url in page.requests)
        page.context.close()


def say(page, text):
    page.get_by_label("message", exact=True).fill(text)
    page.get_by_label("message", exact=True).press("Enter")
    written(page)


def written(page):
    expect(page.get_by_role("button", name="send")).to_be_visible(timeout=60_000)
    expect(page.locator(".writing")).to_have_count(0)


# ----------------------------------------------------------------------------------------------------------------------
# a person and the page


def test_an_answer_streams_and_can_be_stopped(open_page, pygpt):
    page = open_page(pygpt[0])
    expect(page.locator("#model")).to_contain_text("pygpt \u00b7 transformer.h.10, 768 features")
    # tokens stream: seen one after the other before the answer is done
    page.get_by_label("tokens", exact=True).fill("400")
    page.get_by_label("raw text").check()
    page.get_by_label("message", exact=True).fill("def main(argv):\n")
    page.get_by_label("message", exact=True).press("Enter")
    tokens = page.locator("#talk .tokens span")
    expect(tokens.nth(2)).to_be_visible()
    first = tokens.count()
    expect(tokens.nth(first + 5)).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator(".note")).to_have_text("stopped")
    written(page)
    assert tokens.count() < 400
    page.get_by_role("button", name="new conversation").click()
    assert page.locator("#talk > li").count() == 0


def test_tokens_features_steering_and_a_reload(open_page, pygpt):
    page = open_page(pygpt[0])
    tokens = page.locator("#talk .tokens span")
    say(page, "What does os.path.join do?")
    answer = page.locator(".answer .tokens").inner_text()
    assert len(answer) > 5
    tokens.nth(1).click()
    expect(page.locator("#token h2")).to_contain_text("token")
    assert 1 <= page.locator("#token .rows li").count() <= 9
    page.get_by_role("button", name="why this token?").click()
    expect(page.locator("#token")).to_contain_text("added to its logit")
    row = page.locator("#token .rows button").first
    latent = row.locator("b").inner_text()
    row.click()
    expect(page.locator("#feature h2")).to_contain_text(f"feature {latent}: ")
    expect(page.locator("#feature")).to_contain_text("promotes")
    assert page.locator("#shade").input_value() == "feature"
    shades = [float(s.evaluate("e => e.style.getPropertyValue('--a')")) for s in tokens.all()]
    assert max(shades) > 0.1
    assert min(shades) == 0
    with page.expect_popup() as popup:
        page.get_by_role("link", name="open feature page").click()
    assert popup.value.url.endswith(f"/dashboards/0/index.html#{latent}")
    assert "the dashboard" in popup.value.content()
    popup.value.close()
    page.screenshot(path=OUTPUT / "chat_feature.png")
    # steer it: plain and steered beside each other, and they differ
    page.get_by_role("button", name="steer it").click()
    slider = page.get_by_label(f"strength of feature {latent}").first
    slider.evaluate("e => { e.value = e.max; e.dispatchEvent(new Event('input')); }")
    strength = page.locator(".edit input[type=number]").input_value()
    assert float(strength) > 5
    page.get_by_role("button", name="answer again").click()
    written(page)
    assert page.locator(".answer").count() == 2
    plain, steered = (box.inner_text() for box in page.locator(".answer .tokens").all())
    assert plain == answer
    assert steered != answer
    expect(page.locator(".answer.steered")).to_contain_text(f"steered: {latent}:+{strength}")
    page.screenshot(path=OUTPUT / "chat_steered.png")
    # a reload loses nothing; the conversation goes on
    page.reload()
    expect(page.locator(".answer .tokens")).to_have_count(2)  # the page asks the server for its settings first
    assert [box.inner_text() for box in page.locator(".answer .tokens").all()] == [plain, steered]
    assert page.locator(".edit input[type=number]").input_value() == strength
    page.get_by_label("compare").uncheck()
    say(page, "And re.sub?")
    assert page.locator("#talk > li").count() == 2
    assert page.locator(".answer").count() == 3
    page.get_by_role("button", name=f"stop steering {latent}").click()
    assert page.locator(".edit").count() == 0
    page.get_by_role("button", name="new conversation").click()
    assert page.locator("#talk > li").count() == 0


def test_finding_features(open_page, pygpt):
    page = open_page(pygpt[0])
    page.get_by_label("find a feature").fill("label 123")
    expect(page.locator("#found li")).to_have_count(1)
    page.get_by_label("find a feature").fill("script")
    expect(page.locator("#found li").nth(5)).to_be_visible()
    assert page.locator("#found script, #found img, #found b b").count() == 0
    page.locator("#found button").first.click()
    expect(page.locator("#feature h2")).to_contain_text("<script>alert(1)</script>")
    page.get_by_role("button", name="steer it").click()
    expect(page.locator(".edit")).to_contain_text("<script>alert(1)</script>")
    page.get_by_label("find a feature").fill("no such words")
    expect(page.locator("#found")).to_contain_text("no matches")


def test_nothing_can_be_asked_before_it_is_known_whom(open_page, pygpt):
    page = open_page(pygpt[0])
    held = []
    page.route("**/api/about", lambda route: held.append(route))  # not answered yet
    page.reload()
    page.wait_for_function("document.readyState === 'complete'")
    assert page.get_by_label("message", exact=True).is_disabled()
    assert not page.locator("#side").is_visible()
    held[0].continue_()
    page.get_by_label("find a feature").fill("label 123")
    expect(page.locator("#found li")).to_have_count(1)
    expect(page.get_by_label("message", exact=True)).to_be_enabled()


def test_by_keyboard_in_the_dark_on_a_narrow_screen(open_page, pygpt):
    page = open_page(pygpt[0], "dark", 400)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 27)"
    expect(page.locator("#message")).to_be_focused()
    page.keyboard.type("What does json.dumps do?")
    page.keyboard.press("Enter")
    written(page)
    focused = lambda what: page.evaluate(f"document.activeElement.{what}")
    page.keyboard.press("Shift+Tab")  # from the message to the answer
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    assert focused("at") == 1
    page.keyboard.press("Enter")
    expect(page.locator("#token h2")).to_contain_text("token")
    latent = focused("firstChild.textContent")
    page.keyboard.press("Escape")
    assert focused("at") == 1
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    expect(page.locator("#feature h2")).to_contain_text(f"feature {latent}")
    expect(page.get_by_role("button", name="steer it")).to_be_focused()
    page.keyboard.press("Enter")
    before = focused("value")
    page.keyboard.press("ArrowRight")
    assert float(focused("value")) > float(before)
    for _ in range(3):
        page.keyboard.press("Tab")  # number, drop, message
    assert focused("id") == "message"
    page.keyboard.type("And re.sub?")
    page.keyboard.press("Enter")
    written(page)
    assert page.locator(".answer").count() == 3
    page.locator("h1").click()
    page.keyboard.press("/")
    assert focused("id") == "message"
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    for part in (".edit button.name", ".edit input[type=range]", ".edit input[type=number]"):
        assert page.locator(part).bounding_box()["width"] > 60, "squeezed"
    page.screenshot(path=OUTPUT / "chat_narrow_dark.png", full_page=True)
    wide = open_page(pygpt[0], "dark")
    wide.get_by_role("button", name="What does re.sub do?").click()  # an example
    written(wide)
    assert not wide.locator("#empty").is_visible()
    shades = [
        float(s.evaluate("e => e.style.getPropertyValue('--a')")) for s in wide.locator("#talk .tokens span").all()
    ]
    assert len(set(shades)) > 2, "a token's shade says how strong its feature is, compared with text"
    wide.locator("#talk .tokens span").nth(2).click()
    wide.screenshot(path=OUTPUT / "chat_dark.png")


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory):
    """A model most of whose tokens are markup, with an SAE."""
    folder = tmp_path_factory.mktemp("hostile")
    ranks = [bytes([b]) for b in range(256)] + [f"{HOSTILE[i % 4]}{i}".encode() for i in range(800)]
    tokenizer = BPETokenizer(r"\s|\S", ranks, CHAT_TOKENS)
    tokenizer.save(folder / "tokenizer.json")
    model = GPT(GPTConfig(64, tokenizer.vocab_size, 2, 2, 16), generator=torch.Generator().manual_seed(0))
    save_atomic(model.to_checkpoint(), folder / "ckpt.pt")
    sae = create_sae(SAEConfig(d_in=16, d_sae=64, k=4))
    save_sae(sae, folder / "run", hookpoint="transformer.h.1", model_name=str(folder / "ckpt.pt"))
    return folder / "run"


def test_markup_is_text(open_page, hostile_run):
    steer = ("--steer", "5:|0", "7:+1.5@generated", "8:-2")
    with server("--sae_path", str(hostile_run), "--max_new_tokens", "40", *steer) as (port, _):
        page = open_page(port)
        edits = page.locator(".edit")  # those that no slider can show are there, too
        expect(edits).to_have_count(3)  # they come with the server's answer
        assert edits.locator("code").all_inner_texts() == ["5:|0", "7:+1.5@generated"]
        assert edits.last.locator("input[type=number]").input_value() == "-2"
        say(page, "<script>alert(3)</script><img src=x onerror=alert(4)>")
        assert page.locator(".said").inner_text() == "<script>alert(3)</script><img src=x onerror=alert(4)>"
        expect(page.locator(".answer.steered")).to_contain_text("steered: 5:|0 7:+1.5@generated 8:-2")
        edits.get_by_role("button", name="stop 5:|0").click()
        assert edits.count() == 2
        text = page.locator(".answer .tokens").first.inner_text()
        assert "<script>alert(1)</script>" in text
        assert "onerror=alert(2)" in text
        hot = page.locator("#talk .tokens span", has_text="<script>").first
        hot.click()
        expect(page.locator("#token h2")).to_contain_text("<script>alert(1)</script>")
        page.locator("#token .rows button").first.click()
        expect(page.locator("#feature")).to_contain_text("promotes")
        page.get_by_role("button", name="steer it").click()
        page.get_by_role("button", name="answer again").click()
        written(page)
        page.reload()
        assert page.locator("#talk script, #talk img, #talk b, aside script, aside img").count() == 0
        assert page.locator("script").count() == 1
        page.screenshot(path=OUTPUT / "chat_hostile.png")


# ----------------------------------------------------------------------------------------------------------------------
# the server


def send(port, method="POST", path="/api/talk", body=None, **headers):
    """Status and json (or text) of a response."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    sent = {"content-type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
    body = json.dumps(body) if isinstance(body, (dict, list)) else body
    connection.request(method, path, body, {k: v for k, v in sent.items() if v is not None})
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    try:
        return response.status, json.loads(text)
    except ValueError:
        return response.status, text


GOOD = question(3, 4)


@pytest.mark.parametrize(
    ("status", "says", "request_"),
    [
        (421, "does not go by", {"body": GOOD, "host": "evil.example:80"}),
        (421, "does not go by", {"method": "GET", "path": "/", "host": "evil.example"}),
        (403, "may not talk", {"body": GOOD, "origin": "http://evil.example"}),
        (403, "may not talk", {"body": GOOD, "origin": "null"}),
        (403, "may not talk", {"body": GOOD, "sec_fetch_site": "cross-site"}),
        (415, "application/json", {"body": json.dumps(GOOD), "content_type": "text/plain"}),
        (413, "bytes", {"body": b"x" * 300_000}),
        (413, "bytes", {"body": (b"x" * 60_000 for _ in range(5))}),
        (400, "not valid json", {"body": b"{"}),
        (400, "not valid json", {"body": b"[" * 100_000}),
        (400, "not valid json", {"body": b"\xff"}),
        (400, "messages", {"body": b"[]"}),
        (400, "messages", {"body": {}}),
        (400, "no message", {"body": {"messages": []}}),
        (400, "role and a content", {"body": {"messages": [{"role": "user", "content": 3}]}}),
        (400, "list of dict", {"body": {"messages": ["hi"]}}),
        (400, "at most 1024", {"body": {**GOOD, "max_new_tokens": 5000}}),
        (400, "max_new_tokens", {"body": {**GOOD, "max_new_tokens": 1e9}}),
        (400, "unknown setting 'colour'", {"body": {**GOOD, "colour": 3}}),
        (400, "not a valid edit", {"body": {**GOOD, "steer": ["<script>"]}}),
        (400, "0 to 767", {"body": {**GOOD, "steer": ["768:+1"]}}),
        (400, "not a valid edit", {"body": {**GOOD, "steer": ["9" * 5000 + ":+1"]}}),
        (400, "at most 256", {"body": {**GOOD, "steer": ["7:+1"] * 257}}),
        (400, "temperature", {"body": {**GOOD, "temperature": "hot"}}),
        (405, "", {"method": "GET"}),
        (404, "", {"method": "GET", "path": "/nothing"}),
        (404, "", {"method": "GET", "path": "/dashboards/0/../../cfg.json"}),
        (404, "", {"method": "GET", "path": "/dashboards/0/%2e%2e/%2e%2e/cfg.json"}),
        (400, "numbered", {"method": "GET", "path": "/api/feature?sae=transformer.h.10&latent=-1"}),
        (400, "numbered", {"method": "GET", "path": "/api/feature?sae=transformer.h.10&latent=768"}),
        (400, "no SAE", {"method": "GET", "path": "/api/search?sae=x&words=y"}),
        (400, "id", {"path": "/api/explain", "body": {"token": "x", "ids": [], "ask": GOOD}}),
        (400, "0 to", {"path": "/api/explain", "body": {"token": 1, "ids": [10**9], "ask": GOOD}}),
    ],
)
def test_refusals_are_words(pygpt, status, says, request_):
    got, value = send(pygpt[0], **request_)
    assert got == status
    assert says in (value["error"] if isinstance(value, dict) else value)


def test_what_is_good_is_served(pygpt):
    port = pygpt[0]
    find = lambda words: send(port, "GET", f"/api/search?sae=transformer.h.10&words={quote(words)}")
    assert find("767") == (200, [{"latent": 767, "label": "label 767"}])
    assert find("768") == find("\u00b2") == find("9" * 150) == (200, [])
    (sae,) = send(port, "GET", "/api/about")[1]["saes"]
    assert sae["largest"] == [10.0] * 768
    assert ask(port, GOOD)["end"] in ("length", "done")
    assert send(port, body=GOOD, host=f"localhost:{port}", origin=f"http://localhost:{port}")[0] == 200
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/")
    response = connection.getresponse()
    assert "script-src 'self'" in response.headers["content-security-policy"]
    assert response.headers["x-frame-options"] == "DENY"
    assert "server" not in response.headers
    response.read()
    connection.close()


def test_garbage_on_the_wire_harms_nobody(pygpt, half_requests):
    port = pygpt[0]
    for garbage in (
        b"\x00\xff" * 500,
        b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 20_000,
        b"POST /api/talk HTTP/1.1\r\nHost: x\r\nContent-Length: -4\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=10) as s:
            s.sendall(garbage)
            with contextlib.suppress(ConnectionError):
                assert s.recv(100)[:12] in (b"HTTP/1.1 400", b"HTTP/1.1 431", b"")
    assert ask(port, GOOD)["end"] in ("length", "done")


def cpu_seconds(pid):
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13])) / 100


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's /proc")
def test_generation_stops_when_the_client_leaves(pygpt):
    port, pid = pygpt
    long = {**GOOD, "max_new_tokens": 1024, "raw": True, "messages": [{"role": "user", "content": "def f(x):\n"}]}
    for _ in range(5):
        ask(port, long, leave_after=2)
    time.sleep(0.5)
    before = cpu_seconds(pid)
    time.sleep(1.5)
    assert cpu_seconds(pid) - before < 0.4, "the model still writes for nobody"


def test_a_slow_reader_holds_up_nobody(pygpt):
    """Clients that read nothing at all, more than are written at once."""
    port = pygpt[0]
    body = json.dumps({**GOOD, "max_new_tokens": 200}).encode()
    lines = ("POST /api/talk HTTP/1.1", f"Host: 127.0.0.1:{port}", "Content-Type: application/json")
    head = "\r\n".join((*lines, f"Content-Length: {len(body)}", "", ""))
    slow = [socket.create_connection(("127.0.0.1", port)) for _ in range(12)]
    for s in slow:
        s.sendall(head.encode() + body)
    assert ask(port, GOOD)["end"] in ("length", "done")
    for s in slow:
        s.close()


def test_fifty_clients(pygpt):
    """For a few seconds; benchmarks/bench_server.py does it for a minute."""
    port, pid = pygpt
    found = storm(port, pid, clients=50, seconds=4, n_questions=8, tokens=8)
    assert found["wrong"] == 0
    assert found["answered"] > 20
    before, after = found["memory_mb"]["before"], found["memory_mb"]["after"]
    assert after - before < 150 or before != before
    assert memory_mb(pid) < 2000 or before != before


def test_half_a_request_is_not_waited_for(half_requests):
    """Or some hundreds of them would keep out everybody else."""
    assert [s.recv(100) for s in half_requests] == [b""] * 3


# ----------------------------------------------------------------------------------------------------------------------
# its parts


def numbers(name, n, log):
    for i in range(n):
        log.append((name, i))
        yield {"token": i}
    yield {"end": "done"}


def test_the_writer_takes_turns_and_drops_what_was_left():
    log, got, done = [], {name: [] for name in "abc"}, threading.Event()
    writer = Writer(0)
    jobs = {name: Job(numbers(name, 50, log), got[name].append) for name in "abc"}
    jobs["a"].put = lambda e: (got["a"].append(e), setattr(jobs["b"], "left", True) if len(got["a"]) == 5 else None)
    jobs["c"].put = lambda e: (got["c"].append(e), done.set() if "end" in e else None)
    for job in jobs.values():
        writer.add(job)
    thread = writer.start()
    assert done.wait(10)
    writer.close()
    thread.join(10)
    assert [name for name, _ in log[:6]] == list("abcabc")
    assert len(got["a"]) == len(got["c"]) == 51
    assert len(got["b"]) <= 5


def test_a_look_at_a_feature_waits_for_no_answer():
    log, got, done = [], [], threading.Event()
    writer = Writer(50)
    look = Job(iter([{"end": "done"}]), lambda _: got.append(len(log)), brief=True)

    def put(event):
        if event.get("token") == 20 and len(log) > 20 * page_server.AT_ONCE:
            writer.add(look)
        if "end" in event:
            done.set()

    writer.add(Job(numbers(0, 40, log), put))
    for i in range(1, page_server.AT_ONCE + 5):
        writer.add(Job(numbers(i, 40, log), lambda _: None))
    thread = writer.start()
    assert done.wait(10)
    writer.close()
    thread.join(10)
    assert got == [20 * page_server.AT_ONCE + 1]


def test_the_writer_is_bounded_and_outlives_errors():
    def breaks():
        yield {"token": 1}
        raise ZeroDivisionError("by zero")

    def refuses():
        raise UserError("not like this")
        yield

    writer, got, done = Writer(2), [], threading.Event()
    jobs = [Job(numbers("x", 1, []), got.append) for _ in range(page_server.AT_ONCE + 2)]
    for job in jobs:
        writer.add(job)
    with pytest.raises(HTTPException, match="too many answers are waiting") as refused:
        writer.add(jobs[0])
    assert refused.value.status_code == 503
    jobs[0].left = True
    writer.add(Job(breaks(), got.append))
    jobs[1].left = jobs[2].left = True
    writer.add(Job(refuses(), got.append))
    writer.add(Job(numbers("y", 1, []), lambda e: done.set() if "end" in e else None))
    thread = writer.start()
    assert done.wait(10)
    writer.close()
    thread.join(10)
    assert {"error": "the model failed (ZeroDivisionError: by zero)"} in got
    assert {"error": "not like this"} in got


def test_hosts():
    known = hosts_of("127.0.0.1", 8000)
    assert all(map(known, ("127.0.0.1:8000", "localhost:8000", "LOCALHOST:8000", "[::1]:8000")))
    assert not any(map(known, ("", "127.0.0.1", "127.0.0.1:8001", "evil:8000", "10.0.0.1:8000", "localhost.evil:8000")))
    everywhere = hosts_of("0.0.0.0", 8000)
    assert everywhere("10.0.0.1:8000")
    assert not everywhere("evil.example:8000")
    assert hosts_of("10.0.0.1", 8000)("10.0.0.1:8000")


def test_a_body_that_never_comes(monkeypatch):
    class Slow:
        headers = {"content-type": "application/json"}

        @staticmethod
        async def stream():
            await asyncio.sleep(60)
            yield b""

    monkeypatch.setattr(page_server, "BODY_SECONDS", 0.05)
    with pytest.raises(HTTPException, match="took longer") as refused, ThreadPoolExecutor() as pool:
        # Playwright has a loop of its own in this thread
        pool.submit(lambda: asyncio.run(page_server.read_json(Slow()))).result()
    assert refused.value.status_code == 408


def test_what_cannot_be_served_is_said(monkeypatch):
    start = Ask(({"role": "user", "content": "x"},))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="cannot listen"):
        serve(None, start, host="127.0.0.1", port=taken.getsockname()[1], max_waiting=1)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "sae.chat.server")
    with pytest.raises(UserError, match=r"pip install 'nanosae\[web\]'"):
        importlib.import_module("sae.chat.server")
