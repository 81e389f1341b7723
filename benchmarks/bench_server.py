"""Many clients of the chat page's server at once, on loopback:

    python -m benchmarks.bench_server [--sae_path sae_models/layer_10] [--clients 50] [--seconds 60]

Starts a real server (python -m scripts.chat --web). Every client asks one question after the other out of a small set;
each question was answered alone before, and must get the same answer now, or be refused in words. A fifth of the
clients read slowly, a tenth leaves in the middle. Writes results/bench_server.json.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.machine import about

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "bench_server.json"
NAMES = ("os.path.join", "re.sub", "json.dumps", "random.choice", "itertools.chain", "shutil.copy")


@contextmanager
def server(*flags: str) -> Iterator[tuple[int, int]]:
    """(port, process id) of a server that lives as long as the block."""
    command = [sys.executable, "-m", "scripts.chat", "--web", "--port", "0", *flags]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if found := re.search(r"open http://\S+?:(\d+)", line):
                yield int(found[1]), process.pid
                assert process.poll() is None, "the server died"
                return
        raise AssertionError(f"the server did not start: {said}")
    finally:
        process.terminate()
        process.communicate(timeout=20)


def question(seed: int, tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"What does {NAMES[seed % len(NAMES)]} do?"}]
    steer = [f"{seed}:+6"] if seed % 2 else []
    return {"messages": messages, "seed": seed, "max_new_tokens": tokens, "steer": steer, "top_features": 3}


def ask(port: int, value: dict[str, Any], *, pause: float = 0.0, leave_after: int | None = None) -> dict[str, Any]:
    """The last event of an answer with its tokens' features under "tokens", or {"refused": why}."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request("POST", "/api/talk", json.dumps(value), {"content-type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            why = json.loads(response.read()).get("error", "")
            return {"refused": why if 400 <= response.status < 600 else ""}
        tokens = []
        for line in response:
            event = json.loads(line)
            if "token" in event:
                tokens.append(event["token"])
            if leave_after is not None and len(tokens) >= leave_after:
                return {"left": True}
            if event.keys() & {"end", "error"}:
                return {**event, "tokens": tokens}
            time.sleep(pause)
        return {"cut": True}
    finally:
        connection.close()


def memory_mb(pid: int) -> float:
    """Resident memory of a process (Linux; nan elsewhere)."""
    status = Path(f"/proc/{pid}/status")
    found = re.search(r"VmRSS:\s+(\d+)", status.read_text()) if status.is_file() else None
    return int(found[1]) / 1024 if found else float("nan")


def storm(
    port: int, pid: int, *, clients: int, seconds: float, n_questions: int = 24, tokens: int = 24
) -> dict[str, Any]:
    """Clients at once for some seconds; what came of it."""
    questions = [question(seed, tokens) for seed in range(n_questions)]
    alone = [ask(port, q) for q in questions]
    assert all("end" in a for a in alone), alone
    assert len({a["text"] for a in alone}) > n_questions // 2
    counts: Counter[str] = Counter()
    waits: list[float] = []
    lock, stop = threading.Lock(), time.monotonic() + seconds

    def client(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < stop:
            i, begun = rng.randrange(n_questions), time.monotonic()
            pause = 0.05 if number % 5 == 0 else 0.0
            try:
                got = ask(port, questions[i], pause=pause, leave_after=3 if number % 10 == 1 else None)
            except (OSError, http.client.HTTPException, ValueError) as e:
                got = {"broken": repr(e)}
            kind = (
                "answered"
                if got == alone[i]
                else "refused"
                if got.get("refused")
                else "left"
                if "left" in got
                else "wrong"
            )
            with lock:
                counts[kind] += 1
                if kind == "answered":
                    waits.append(time.monotonic() - begun)
                if kind == "wrong":
                    print("wrong:", json.dumps(got)[:300], file=sys.stderr)

    before = memory_mb(pid)
    threads = [threading.Thread(target=client, args=(n,)) for n in range(clients)]
    for t in threads:
        t.start()
    middle = 0.0
    while any(t.is_alive() for t in threads):
        time.sleep(0.2)
        if not middle and time.monotonic() > stop - seconds / 2:
            middle = memory_mb(pid)
    for t in threads:
        t.join()
    return {
        "clients": clients,
        "seconds": seconds,
        **{k: counts[k] for k in ("answered", "refused", "left", "wrong")},
        "median_wait_s": round(statistics.median(waits), 3) if waits else None,
        "tokens_per_answer": tokens,
        "memory_mb": {"before": round(before), "middle": round(middle), "after": round(memory_mb(pid))},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae_path", help="a run (default: the newest)")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    args = parser.parse_args()
    with server(*(["--sae_path", args.sae_path] if args.sae_path else [])) as (port, pid):
        found = storm(port, pid, clients=args.clients, seconds=args.seconds)
    found["about"] = about()
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
