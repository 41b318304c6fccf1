"""After 10,000 requests nothing is left over: no descriptor, no task, no place, no memory worth naming."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from tests.house import USER, Gateway, eventually, running_gateway

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

REQUESTS = 10_000
CLIENTS = 16
MAX_RSS_MIB = 80


def rss_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


class Client:
    """Requests over one connection kept alive; every 20th time it leaves in mid-answer and comes anew."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.bad: list[bytes] = []

    async def run(self, count: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        for number in range(count):
            stream = number % 3 == 0
            await self.send(writer, stream, tokens=300 if number % 20 == 19 else 4)
            if number % 20 == 19:
                await reader.readline()
                writer.transport.abort()
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            else:
                await self.receive(reader)
        writer.close()

    async def send(self, writer: asyncio.StreamWriter, stream: bool, tokens: int) -> None:
        body = json.dumps(
            {"messages": [{"role": "user", "content": "hi"}], "max_tokens": tokens, "stream": stream}
        ).encode()
        writer.write(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {USER}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )

    async def receive(self, reader: asyncio.StreamReader) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 200"):
            self.bad.append(head)
        if b"Transfer-Encoding: chunked" in head:
            body = await reader.readuntil(b"\r\n0\r\n\r\n")
            if b"data: [DONE]" not in body:
                self.bad.append(body)
        else:
            length = head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0]
            json.loads(await reader.readexactly(int(length)))


def tasks(gateway: Gateway) -> int:
    text = gateway.get("/metrics", key=None).body.decode()
    return int(float(next(line for line in text.splitlines() if line.startswith("gateway_asyncio_tasks ")).split()[1]))


def leftovers(gateway: Gateway) -> dict[str, float]:
    """What should be nothing when nobody asks for anything."""
    summary = gateway.get("/v1/queue/stats").json()["summary"]
    metrics = gateway.request("GET", "/metrics", key=None, headers={"Accept": "application/json"}).json()["gateway"]
    return {
        "processing": summary["total_processing"],
        "queued": summary["total_queued"],
        "active": metrics["requests_active"],
        "slots": gateway.slots_busy(),
    }


async def test_ten_thousand_requests(tmp_path: Path, chat_model: Path) -> None:
    with running_gateway(tmp_path, MODEL_PATH=str(chat_model), CTX="1024") as gateway:
        pid = gateway.process.pid
        await asyncio.gather(*(Client(gateway.port).run(5) for _ in range(CLIENTS)))
        eventually(lambda: not any(leftovers(gateway).values()))
        before, tasks_before = descriptors(pid), tasks(gateway)
        clients = [Client(gateway.port) for _ in range(CLIENTS)]
        await asyncio.gather(*(client.run(REQUESTS // CLIENTS) for client in clients))
        assert [bad for client in clients for bad in client.bad] == []
        eventually(lambda: not any(leftovers(gateway).values()))
        eventually(lambda: descriptors(pid) <= before and tasks(gateway) <= tasks_before)
        assert rss_mib(pid) < MAX_RSS_MIB
        total = gateway.request("GET", "/metrics", key=None, headers={"Accept": "application/json"}).json()["gateway"]
        assert total["requests_total"] >= REQUESTS
