"""A bad day of a server: many clients at once, some killed in the middle of an answer, some that send too much or no request.

    based serve runs/demo/hf --port 8000 --queue 64 & python -m benchmarks.serve_load http://127.0.0.1:8000 --seconds 60

Greedy answers to each prompt must be equal all the time; the server's memory and threads are read from /proc, where it runs here.
"""

import argparse
import collections
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

PROMPTS = [
    f"{start} {middle}" for start in ("import os", "def f(x):", "class A") for middle in ("", "\n    return", "# The")
]
KINDS = ("whole", "stream", "killed", "leaves", "oversized", "malformed")
WEIGHTS = (8, 8, 2, 2, 1, 1)


def ask(url: str, stream: bool, max_tokens: int) -> tuple[str, str]:
    """(outcome, text) of a good request."""
    prompt = random.choice(PROMPTS)
    body = json.dumps({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "stream": stream}).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body), timeout=120) as answer:
            if not stream:
                return "answered", f"{prompt}|{json.load(answer)['choices'][0]['text']}"
            events = [line[6:] for line in answer.read().decode().splitlines() if line.startswith("data: ")]
            texts = [json.loads(event)["choices"][0]["text"] for event in events[:-1]]
            return ("answered", f"{prompt}|{''.join(texts)}") if events[-1] == "[DONE]" else ("cut off", "")
    except urllib.error.HTTPError as error:
        return f"status {error.code}", ""


def leave(url: str) -> tuple[str, str]:
    """A client that goes after its request, or in the middle of an answer."""
    place = urllib.parse.urlsplit(url)
    body = json.dumps({"prompt": random.choice(PROMPTS), "max_tokens": 1000, "stream": True}).encode()
    with socket.create_connection((place.hostname, place.port), timeout=30) as client:
        client.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        )
        time.sleep(random.random() / 2)
    return "left", ""


def send(url: str, body: bytes, expected: int) -> tuple[str, str]:
    """A body that must be refused."""
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/completions", body), timeout=60):
            return "ACCEPTED", ""
    except urllib.error.HTTPError as error:
        return ("refused" if error.code == expected else f"WRONG {error.code}"), ""
    except (urllib.error.URLError, ConnectionError):
        return "refused", ""  # while it was still sending


def client(url: str, kind: str, seed: int, results: Any) -> None:
    """One request of a kind, in a process of its own."""
    random.seed(seed)
    calls: dict[str, Callable[[], tuple[str, str]]] = {
        "whole": lambda: ask(url, False, 24),
        "stream": lambda: ask(url, True, 24),
        "killed": lambda: ask(url, True, 2000),
        "leaves": lambda: leave(url),
        "oversized": lambda: send(url, b'{"prompt": "' + b"x" * 3_000_000 + b'"}', 413),
        "malformed": lambda: send(url, random.randbytes(200), 400),
    }
    outcome = calls[kind]()
    if kind != "killed":  # it may die with the lock of the queue
        results.put((kind, *outcome))


def memory_mib(pid: int) -> float:
    """Resident memory of a process."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> int:
    """Load the server; print a table; 1 if an answer was wrong or the server is not well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--pid", type=int, default=0, help="process of the server, for its memory")
    options = parser.parse_args()
    outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
    texts: dict[str, set[str]] = collections.defaultdict(set)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    running: dict[Any, tuple[str, float]] = {}
    start, seed, memory = time.monotonic(), 0, []

    def collect() -> None:
        while not results.empty():
            kind, outcome, text = results.get()
            outcomes[kind, outcome] += 1
            prompt, _, rest = text.partition("|")
            if outcome == "answered":
                texts[prompt].add(rest)

    while running or time.monotonic() < start + options.seconds:
        is_open = time.monotonic() < start + options.seconds
        while is_open and len(running) < options.clients:
            kind = random.choices(KINDS, WEIGHTS)[0]
            process = context.Process(target=client, args=(options.url, kind, seed, results))
            process.start()
            seed += 1
            running[process] = (kind, time.monotonic() + random.random())
        for process, (kind, when) in list(running.items()):
            if kind == "killed" and process.is_alive() and time.monotonic() > when:
                os.kill(process.pid, signal.SIGKILL)
                outcomes[kind, "killed"] += 1
            if not process.is_alive():
                process.join()
                del running[process]
        collect()
        if options.pid:
            memory.append(memory_mib(options.pid))
        time.sleep(0.02)
    collect()
    return report(options.url, outcomes, texts, memory, time.monotonic() - start)


def report(
    url: str,
    outcomes: collections.Counter[tuple[str, str]],
    texts: dict[str, set[str]],
    memory: list[float],
    seconds: float,
) -> int:
    """Print what came; the exit code."""
    for (kind, outcome), count in sorted(outcomes.items()):
        print(f"{kind:10} {outcome:12} {count:6}")
    different = {prompt: found for prompt, found in texts.items() if len(found) > 1}
    print(
        f"{sum(outcomes.values())} requests in {seconds:.0f} s; {len(texts)} prompts, {len(different)} with different answers"
    )
    if memory:
        print(
            f"memory of the server: {memory[0]:.0f} MiB at first, {memory[-1]:.0f} at the end, {max(memory):.0f} at most"
        )
    end = time.monotonic() + 30
    numbers: dict[str, str] = {}
    while time.monotonic() < end:
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
        numbers = dict(line.rsplit(" ", 1) for line in lines)
        if numbers["based_running"] == numbers["based_waiting"] == "0":
            break
        time.sleep(0.2)
    print(", ".join(f"{name} {value}" for name, value in numbers.items()))
    wrong = any(outcome.isupper() or outcome.startswith(("WRONG", "cut")) for _, outcome in outcomes)
    is_idle = numbers["based_running"] == numbers["based_waiting"] == "0"
    print("idle again" if is_idle else "NOT IDLE")
    return int(bool(different) or wrong or not is_idle)


if __name__ == "__main__":
    sys.exit(main())
