"""Many streams at once, some cancelled and some killed: no wrong word, no leaked page, memory flat.

    python benchmarks/serve_load.py runs/poet [--streams 64] [--seconds 60] [--hostile]

A server in a process of its own answers on a real socket; an answer must not depend on its company.
First every question is asked alone; then so many clients ask them again and again. Some read to the end, some leave
after a few words, some reset the connection. What each has read must begin the answer given alone, and those who
read on must get all of it. Afterwards nothing may run, wait or hold a page. Memory is flat when its highest level in
the last third of the time is no more than 5 % and 16 MiB above that of the middle third.

With --hostile the same is done twice, the second time with hostile streams among the clients (hostile.py): no whole
answer may take more than twice the longest time without them, and in their midst SIGTERM must be heard within a second.

Prints a table, then one JSON line; ends with 1 where a claim does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

from hostile import attack

TITLES = [
    "长城",
    "春夜",
    "江上",
    "明月",
    "秋风",
    "白云",
    "故人",
    "山寺",
    "落花",
    "夜雨",
    "寒梅",
    "渡口",
]
FORMS = ("五绝", "七绝", "五律", "七律")


@dataclass
class Client:
    """What is common to all clients, and what they saw."""

    port: int
    model: str
    tokens: int
    answers: dict[int, str] = field(default_factory=dict)  # question: what is said to it alone
    ended: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    words: int = 0
    first: list[float] = field(default_factory=list)  # seconds to the first words
    whole: list[float] = field(default_factory=list)  # seconds of whole answers

    def body(self, question: int) -> bytes:
        text = f"{FORMS[question % 4]} {TITLES[question % len(TITLES)]}"
        messages = [{"role": "user", "content": text}]
        more = {"max_tokens": self.tokens, "seed": question, "temperature": 0.9, "stream": True}
        return json.dumps({"model": self.model, "messages": messages, **more}).encode()

    @contextlib.asynccontextmanager
    async def connection(self, body: bytes) -> AsyncIterator[tuple]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        try:
            writer.write(head.encode() + body)
            await writer.drain()
            status = await reader.readuntil(b"\r\n\r\n")
            if b" 200 " not in status.split(b"\r\n")[0]:
                raise ConnectionError(status.split(b"\r\n")[0].decode())
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def read(self, question: int, leave_after: int | None, reset: bool) -> str:
        """Ask, and read to the end or so many events. Returns what was said."""
        said, events, begun = "", 0, time.monotonic()
        async with self.connection(self.body(question)) as (reader, writer):
            rest = b""
            while size := int(await reader.readline(), 16):
                rest += await reader.readexactly(size)
                await reader.readexactly(2)
                *whole, rest = rest.split(b"\n\n")
                for event in whole:
                    if not event.startswith(b"data: ") or event == b"data: [DONE]":
                        continue
                    data = json.loads(event[6:])
                    if "error" in data:
                        raise ConnectionError(data["error"]["message"])
                    words = "".join(c["delta"].get("content") or "" for c in data["choices"])
                    if words and not said:
                        self.first.append(time.monotonic() - begun)
                    said, events = said + words, events + 1
                if leave_after is not None and events >= leave_after:
                    if reset:  # the other side gets an RST in the middle of its sending
                        gone: socket.socket = writer.get_extra_info("socket")
                        gone.setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                        )
                        writer.transport.abort()
                    return said
        self.ended["whole"] += 1
        self.whole.append(time.monotonic() - begun)
        if said != self.answers.setdefault(question, said):
            self.wrong.append(f"question {question}: {said!r}, alone {self.answers[question]!r}")
        return said

    async def keep_asking(self, until: float, pick: random.Random) -> None:
        while time.monotonic() < until:
            question = pick.choice(list(self.answers))
            manner = pick.choices(("read", "leave", "reset"), (6, 2, 2))[0]
            events = None if manner == "read" else pick.randrange(12)
            try:
                said = await self.read(question, events, manner == "reset")
            except (OSError, asyncio.IncompleteReadError) as error:
                self.wrong.append(f"question {question}: {type(error).__name__} {error}")
                continue
            self.words += len(said)
            self.ended[manner] += 1
            if not self.answers[question].startswith(said):
                self.wrong.append(f"question {question}: {said!r} does not begin its answer")


def resident(process: int) -> int:
    """Bytes of memory a process holds."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def metrics(port: int) -> dict[str, float]:
    with socket.create_connection(("127.0.0.1", port)) as one:
        one.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        text = b"".join(iter(lambda: one.recv(65536), b"")).decode()
    return {
        name: float(value) for name, value in re.findall(r"^shenhong_(\w+)\S* (\S+)$", text, re.M)
    }


async def load(
    client: Client, process: int, streams: int, seconds: float, questions: int, hostile: bool
) -> dict:
    for question in range(questions):
        await client.read(question, None, False)
    client.ended.clear()
    client.first.clear()
    client.whole.clear()
    client.words = 0
    begun = time.monotonic()
    until = begun + seconds
    tasks = [
        asyncio.create_task(client.keep_asking(until, random.Random(number)))
        for number in range(streams)
    ]
    attacked = asyncio.create_task(attack(client.port, client.model, until)) if hostile else None
    memory: list[int] = []
    while time.monotonic() < until:
        memory.append(resident(process))
        await asyncio.sleep(min(0.25, seconds / 40))
    await asyncio.gather(*tasks)
    took = time.monotonic() - begun
    tried = dict(await attacked) if attacked else {}
    left: dict[str, float] = {}
    for _ in range(100):
        left = await asyncio.to_thread(metrics, client.port)
        if left["running"] == left["waiting"] == 0 and left["pages_free"] == left["pages"]:
            break
        await asyncio.sleep(0.05)
    third = max(1, len(memory) // 3)
    middle, last = max(memory[third : 2 * third]), max(memory[-third:])
    return {
        "streams": streams,
        "seconds": round(took, 1),
        "answers": client.ended["read"],
        "left": client.ended["leave"],
        "reset": client.ended["reset"],
        "characters_per_second": round(client.words / took, 1),
        "first_words_ms_median": round(1000 * statistics.median(client.first or [0]), 1),
        "whole_answer_s_longest": round(max(client.whole), 2),
        "whole_answer_s_median": round(statistics.median(client.whole), 2),
        "hostile": tried,
        "wrong": len(client.wrong),
        "running_after": left["running"] + left["waiting"],
        "pages_leaked": left["pages"] - left["pages_free"],
        "engine_failures": left["engine_failures_total"],
        "memory_mib_begin": round(memory[0] / 2**20, 1),
        "memory_mib_middle": round(middle / 2**20, 1),
        "memory_mib_end": round(last / 2**20, 1),
        "memory_flat": last <= 1.05 * middle + 16 * 2**20,
        "examples_of_wrong": client.wrong[:3],
    }


@contextlib.contextmanager
def server(model: Path, data: str):
    """Yields (the process, port, name of the model)."""
    free = ("--requests-per-minute", "100000000", "--tokens-per-minute", "1000000000000")
    command = [
        sys.executable,
        "-m",
        "shenhong.cli",
        "serve",
        str(model),
        "--port",
        "0",
        "--data",
        data,
        *free,
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.match(r"(\S+) at http://127\.0\.0\.1:(\d+)", said)
        if not found:
            sys.exit(f"the server did not start: {said!r}")
        yield process, int(found[2]), found[1]
    finally:
        process.terminate()
        process.wait(30)


async def stopped_under_attack(client: Client, process: subprocess.Popen) -> float:
    """Seconds from SIGTERM to the line that says it was heard, with hostile streams under way."""
    attacked = asyncio.create_task(attack(client.port, client.model, time.monotonic() + 4))
    await asyncio.sleep(3)
    begun = time.monotonic()
    process.terminate()
    assert process.stderr is not None
    while "stopping" not in await asyncio.to_thread(process.stderr.readline):
        pass
    heard = time.monotonic() - begun
    with contextlib.suppress(OSError, ValueError):
        await attacked
    return heard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--hostile", action="store_true")
    options = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.2f}")
    results = []
    with (
        tempfile.TemporaryDirectory() as data,
        server(options.model, data) as (process, port, name),
    ):
        client = Client(port, name, options.tokens)
        amount = (options.streams, options.seconds, options.questions)
        for hostile in (False, True)[: 1 + options.hostile]:
            results.append(asyncio.run(load(client, process.pid, *amount, hostile)))
        if options.hostile:
            results[-1]["sigterm_heard_s"] = round(
                asyncio.run(stopped_under_attack(client, process)), 3
            )
    good = True
    for result in results:
        for key, value in result.items():
            print(f"{key:24} {value}")
        clean = not (result["wrong"] or result["running_after"] or result["pages_leaked"])
        good = good and clean and result["memory_flat"] and not result["engine_failures"]
    if options.hostile:
        alone, among = (result["whole_answer_s_longest"] for result in results)
        good = good and among <= 2 * alone and results[-1]["sigterm_heard_s"] <= 1
    print(json.dumps(results if options.hostile else results[0], ensure_ascii=False))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
