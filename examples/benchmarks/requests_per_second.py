# Copyright 2026 The trl_spo authors.
# SPDX-License-Identifier: Apache-2.0
"""
What a jury's requests to an endpoint cost the client: requests per second, memory, and the size of the store.

A critic is asked about pairs of responses, in both orders, `--concurrency` requests at once, over HTTP to a server on this machine. The
server is the scripted one of the tests, in a process of its own: it waits as long as a draw between 0 and `--latency` seconds says, and
is right about which response is better. So the rate is that of this machine, which the two processes share, and no more than
`2 * concurrency / latency`. CPU time per request says what is the client's own.

In the end it is checked that every request has an answer, that none was answered twice (by the server's own count), and that every
verdict is the right one, so that no answer went to another request. The exit status is 1 if not.

    python examples/benchmarks/requests_per_second.py
    python examples/benchmarks/requests_per_second.py --requests 10000 --concurrency 100 --json requests.json
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import psutil

from trl_spo.synthetic import AnswerStore, Endpoint, EndpointCritic, Jury, Pair


SERVER = Path(__file__).parents[2] / "tests" / "synthetic" / "scripted_server.py"
MIB = 2**20


class Pairs:
    """Pairs of long responses, made anew each time they are gone through, so that they take no memory."""

    def __init__(self, number: int):
        self.number = number

    def __iter__(self) -> Iterator[Pair]:
        for i in range(self.number):
            responses = (f"quality {i % 7} " + "one " * 100, f"quality {(i + 3) % 7} " + "another " * 60)
            yield Pair(f"p{i}", ("0", "1"), f"Prompt {i}: " + "word " * 50, responses)

    @staticmethod
    def better(i: int) -> str:
        return "0" if i % 7 > (i + 3) % 7 else "1"


class Watch(threading.Thread):
    """Takes the time, the answers in the store and the memory of this process every few seconds."""

    def __init__(self, store: AnswerStore, seconds: float):
        super().__init__(daemon=True)
        self.store, self.seconds = store, seconds
        self.samples: list[dict[str, float]] = []
        self.ended = threading.Event()
        self.start_time = time.perf_counter()
        self.sample()

    def sample(self) -> None:
        rss = psutil.Process().memory_info().rss
        taken = {"seconds": time.perf_counter() - self.start_time, "answers": len(self.store), "rss_mib": rss / MIB}
        self.samples.append(taken)

    def run(self) -> None:
        while not self.ended.wait(self.seconds):
            self.sample()

    def end(self) -> None:
        self.ended.set()
        self.join()
        self.sample()

    def at(self, share: float) -> dict[str, float]:
        """The sample that is nearest to this share of the answers."""
        goal = share * self.samples[-1]["answers"]
        return min(self.samples, key=lambda sample: abs(sample["answers"] - goal))


def machine() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.split(":")[1].strip() for line in info.open() if line.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores, Python {platform.python_version()}, openai {openai.__version__}"


def measure(args: argparse.Namespace, folder: str) -> tuple[dict[str, Any], Watch]:
    process = subprocess.Popen([sys.executable, str(SERVER)], stdout=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        model = f"right+slow:{args.latency}"
        endpoint = Endpoint(model, base_url=url, api_key_env=None, concurrency=args.concurrency)
        jury, pairs = Jury([EndpointCritic(name="right", endpoint=endpoint)]), Pairs(args.requests // 2)
        path = Path(folder) / "answers.sqlite"
        with AnswerStore(path) as store:
            watch = Watch(store, args.sample_seconds)
            watch.start()
            cpu = time.process_time()
            jury.ask(pairs, store)
            cpu = time.process_time() - cpu
            watch.end()
            server_cpu = sum(psutil.Process(process.pid).cpu_times()[:2])
            start = time.perf_counter()
            wrong = sum(row["winner"] != Pairs.better(i) for i, row in enumerate(jury.verdicts(pairs, store)))
            read = time.perf_counter() - start
        with urllib.request.urlopen(f"{url}/log") as answer:
            log = json.load(answer)
    finally:
        process.kill()
        process.wait()
    seconds, answers = watch.samples[-1]["seconds"], watch.samples[-1]["answers"]
    found = {
        "seconds": seconds,
        "requests_per_second": answers / seconds,
        "client_cpu_ms_per_request": 1000 * cpu / answers,
        "server_cpu_ms_per_request": 1000 * server_cpu / answers,
        "verdicts_per_second": args.requests / 2 / read,
        "store_mib": path.stat().st_size / MIB,
        "bytes_per_answer": path.stat().st_size / answers,
        "answers": answers,
        "unanswered": args.requests - answers,
        "sent": log["requests"],
        "answered_twice": sum(count > 1 for count in log["answered"].values()),
        "wrong_verdicts": wrong,
    }
    return found, watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000, help="two of each pair")
    parser.add_argument("--concurrency", type=int, default=1000, help="requests at once")
    parser.add_argument("--latency", type=float, default=1.0, help="seconds that the server waits at most")
    parser.add_argument("--sample_seconds", type=float, default=5.0, help="between two looks at the memory")
    parser.add_argument("--json", help="file to write the figures to")
    args = parser.parse_args()
    if args.requests < 2 or args.requests % 2:
        parser.error(f"--requests ({args.requests}) must be even, two of each pair")

    where, load = machine(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        found, watch = measure(args, folder)
    load = (load, os.getloadavg()[0])

    print(f"\n{where}; load average before {load[0]:.1f}, after {load[1]:.1f}, with both processes of the benchmark")
    print(f"{args.requests} requests, {args.concurrency} at once, answered after 0 to {args.latency:g} s\n")
    print("| | |\n| --- | --- |")
    print(f"| requests per second | {found['requests_per_second']:.0f} |")
    print(f"| seconds in all | {found['seconds']:.0f} |")
    print(f"| CPU time of the client per request | {found['client_cpu_ms_per_request']:.2f} ms |")
    print(f"| CPU time of the server per request | {found['server_cpu_ms_per_request']:.2f} ms |")
    print(f"| store | {found['store_mib']:.1f} MiB |")
    print(f"| store per answer | {found['bytes_per_answer']:.0f} bytes |")
    print(f"| verdicts read from the store per second | {found['verdicts_per_second']:.0f} |")
    print(f"| requests sent / unanswered / answered twice | {found['sent']} / {found['unanswered']} / ", end="")
    print(f"{found['answered_twice']} |")
    print(f"| wrong verdicts | {found['wrong_verdicts']} |\n")
    print("| answers | seconds | memory of the client (RSS, MiB) |\n| --- | --- | --- |")
    for share in (0, 0.25, 0.5, 0.75, 1):
        sample = watch.at(share)
        name = "start" if share == 0 else f"{share:.0%} ({sample['answers']})"
        print(f"| {name} | {sample['seconds']:.0f} | {sample['rss_mib']:.0f} |")
    if args.json:
        content = {"machine": where, "load": load, "options": vars(args), "results": found, "samples": watch.samples}
        Path(args.json).write_text(json.dumps(content, indent=2))
    if found["unanswered"] or found["answered_twice"] or found["wrong_verdicts"]:
        sys.exit("A request is unanswered or was answered twice, or a verdict is wrong: see the table.")


if __name__ == "__main__":
    main()
