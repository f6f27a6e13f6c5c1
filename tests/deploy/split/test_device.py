"""Two processes and HTTP between them: the answer of the whole network, in time, whatever the other side does."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from tests.deploy.serve.service import Service, running
from tests.deploy.split.conftest import SPEC, student
from tests.deploy.wire import heard
from trimtab import cli
from trimtab.core.errors import ArtifactError
from trimtab.deploy.split.codec import checksum
from trimtab.deploy.split.device import Device, Newest, Superseded
from trimtab.deploy.split.link import Unanswered
from trimtab.deploy.split.parts import export, read_parts


@pytest.fixture(scope="module")
def server(parts: Path) -> Iterator[Service]:
    with running(parts, "--seconds", "2", "--places", "4") as service:
        yield service
        assert service.process.poll() is None  # nothing that the tests sent has brought it down


@pytest.fixture
def client(server: Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.address, timeout=20, trust_env=False) as opened:
        yield opened


def test_the_answer_is_that_of_the_whole_network(parts: Path, server: Service, images: np.ndarray) -> None:
    device = Device(parts, server.address, deadline=10)
    with torch.no_grad():
        want = student()(torch.from_numpy(images)).numpy()
    for x, logits in zip(images, want):
        got = device.ask(x)
        assert got.origin == "server" and np.allclose(got.logits, logits, atol=1e-4)
        assert got.label == "abcde"[logits.argmax()] and got.confidence == pytest.approx(
            np.exp(logits).max() / np.exp(logits).sum(), rel=1e-3
        )
    assert got.payload % 4 == 0 and got.payload < got.sent < got.payload + 280  # the head is not large
    assert 20 < got.received < 300
    assert got.total_ms >= got.server_ms > 0 and got.encode_ms > 0
    assert device((images[0].transpose(1, 2, 0) * 20 + 128).clip(0, 255).astype(np.uint8)).origin == "server"


def test_both_processes_have_the_same_numbers(parts: Path, server: Service, images: np.ndarray) -> None:
    device = Device(parts, server.address, deadline=10)
    for x in images:
        symbols = device.symbols(x)
        assert len(np.unique(symbols)) > 5
        assert (device.echo(x) == symbols).all()


def request(device: Device, x: np.ndarray, **headers: str) -> dict[str, Any]:
    """What a device would send, with other headers."""
    payload = device.codec.encode(device.symbols(x))
    usual = {"split-parts": device.parts.id, "checksum": checksum(payload), "deadline-ms": "9000"}
    return {"content": payload, "headers": {**usual, "idempotency-key": str(time.monotonic_ns())} | headers}


def test_what_is_wrong_is_refused_with_a_reason(
    parts: Path, server: Service, client: httpx.Client, images: np.ndarray
) -> None:
    device = Device(parts, server.address, deadline=10)
    good = request(device, images[0])
    for status, words, changes in (
        (409, "for other parts than", request(device, images[0], **{"split-parts": "another"})),
        (400, "its checksum is wrong", request(device, images[0], checksum="00000000")),
        (400, "its checksum is wrong", good | {"content": good["content"][:-1] + b"x"}),
        (422, "multiple of 4", request(device, images[0], checksum=checksum(b"abc")) | {"content": b"abc"}),
        (408, "not complete within 0 seconds", request(device, images[0], **{"deadline-ms": "0"})),
        (422, "finite number", request(device, images[0], **{"deadline-ms": "nan"})),
        (422, "deadline-ms", request(device, images[0], **{"deadline-ms": "-1"})),
        (422, "idempotency-key", request(device, images[0], **{"idempotency-key": "k" * 65})),
        (422, "split-parts", {"content": b""}),
        (413, "larger than", request(device, images[0]) | {"content": bytes(100_000)}),
    ):
        answer = client.post("/logits", **changes)
        assert answer.status_code == status and words in answer.json()["error"], answer.text
    assert client.get("/logits").status_code == 405
    assert device.ask(images[0]).origin == "server"


def test_a_payload_that_dribbles_in_is_told_so_and_holds_up_nobody(
    parts: Path, server: Service, client: httpx.Client, images: np.ndarray
) -> None:
    device = Device(parts, server.address, deadline=10)
    good = request(device, images[0], **{"content-length": "4"})
    head = "POST /logits HTTP/1.1\r\nhost: a\r\n" + "".join(f"{k}: {v}\r\n" for k, v in good["headers"].items())
    with server.connect() as slow:
        slow.sendall(head.encode() + b"\r\nab")
        assert device.ask(images[0]).origin == "server"
        told = heard(slow)
        assert b" 408 " in told.split(b"\r\n")[0] and b"not complete within 2 seconds" in told
    held = [server.connect() for _ in range(4)]
    try:
        for raw in held:
            raw.sendall(head.encode() + b"\r\nab")
        deadline = time.monotonic() + 2
        while (answer := client.post("/logits", **request(device, images[0]))).status_code == 200:
            assert time.monotonic() < deadline
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert device.ask(images[1]).origin == "server"  # it tries until they have been sent away
    finally:
        for raw in held:
            raw.close()


def test_a_request_that_comes_again_gets_the_same_answer_without_work(
    parts: Path, server: Service, client: httpx.Client, images: np.ndarray
) -> None:
    device = Device(parts, server.address, deadline=10)
    first = client.post("/logits", **request(device, images[0], **{"idempotency-key": "again"}))
    assert first.headers["checksum"] == checksum(first.content) and len(first.content) == 4 * 5
    other = client.post("/logits", **request(device, images[1], **{"idempotency-key": "again"}))
    assert other.content == first.content
    assert client.post("/logits", **request(device, images[1])).content != first.content


def test_health_and_metrics_say_what_is_served(parts: Path, client: httpx.Client) -> None:
    told = client.get("/health").json()
    known, _ = read_parts(parts)
    assert (told["status"], told["parts"], told["labels"]) == ("ok", known.id, 5)
    assert (told["input"], told["latent"], told["max_bytes"]) == ([3, 32, 32], [4, 15, 15], 8 * (4 * 15 * 15 + 1))
    assert 'trimtab_requests_total{path="/health",status="200"}' in client.get("/metrics").text
    paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {"/health", "/logits", "/metrics"}
    assert {"400", "408", "409", "413", "422", "429"} <= set(paths["/logits"]["post"]["responses"])


@contextmanager
def peer(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """Somebody at an address who does as told with each connection."""
    listening = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        with suppress(OSError):
            while True:
                raw, _ = listening.accept()
                with raw, suppress(OSError, ValueError):
                    behave(raw)

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()


def answering(content: bytes, status: str = "200 OK", **headers: str) -> Callable[[socket.socket], None]:
    """An answer with the right length and checksum, unless told otherwise."""
    told = {"content-length": str(len(content)), "checksum": checksum(content)} | headers
    lines = [f"HTTP/1.1 {status}", *(f"{k.replace('_', '-')}: {v}" for k, v in told.items()), "", ""]

    def behave(raw: socket.socket) -> None:
        heard(raw)
        raw.sendall("\r\n".join(lines).encode() + content)
        raw.recv(1)

    return behave


def dribbling(before: bytes) -> Callable[[socket.socket], None]:
    def behave(raw: socket.socket) -> None:
        heard(raw)
        raw.sendall(before)
        for _ in range(100):
            raw.sendall(b"x")
            time.sleep(0.02)

    return behave


def sending(raw: socket.socket, before: bytes, more: bytes) -> None:
    heard(raw)
    raw.sendall(before)
    while True:
        raw.sendall(more)


OK = b"HTTP/1.1 200 OK\r\n"
BAD_PEERS: dict[str, tuple[Callable[[socket.socket], None], str]] = {
    "silent": (lambda raw: time.sleep(1.0), "too slow"),
    "hangs up": (lambda raw: heard(raw) and None, "without sending a response"),
    "hangs up halfway": (lambda raw: raw.sendall(OK + b"content-length: 20\r\n\r\n12") if heard(raw) else None, "peer"),
    "a head that dribbles": (dribbling(OK + b"a: "), "too slow"),
    "an answer that dribbles": (dribbling(OK + b"content-length: 5000\r\n\r\n"), "too slow"),
    "no HTTP": (lambda raw: heard(raw) and raw.sendall(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), "illegal status line"),
    "a head without end": (lambda raw: sending(raw, OK, b"a: b\r\n" * 999), "buffer too long"),
    "an answer without end": (lambda raw: sending(raw, OK + b"\r\n", bytes(65536)), "larger than 65,536 bytes"),
    "hints without end": (lambda raw: sending(raw, b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 99), "too slow"),
    "damaged": (answering(bytes(20), checksum="12345678"), "checksum is wrong"),
    "packed": (answering(bytes(8), content_encoding="gzip"), "no list of finite logits"),
    "too few logits": (answering(bytes(8)), "no list of finite logits"),
    "no numbers": (answering(b"\xff" * 20), "no list of finite logits"),
    "strange times": (answering(b"\xff" * 20, server_timing="tail;dur=1e999"), "no list of finite logits"),
    "elsewhere": (answering(b"", "302 Found", location="http://127.0.0.1:1/"), "HTTP 302"),
    "an error": (answering(b'{"error": "out of\\u001b memory"}', "500 No"), "HTTP 500: out of  memory"),
    "a deep error": (answering(b"[" * 60_000, "500 No"), "HTTP 500"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_PEERS)
def test_a_bad_peer_costs_the_deadline_and_nothing_else(parts: Path, images: np.ndarray, name: str) -> None:
    behave, words = BAD_PEERS[name]
    with peer(behave) as url:
        device = Device(parts, url, deadline=0.3, fallback=lambda x: np.array([0, 0, 9, 0, 0]))
        start = time.monotonic()
        got = device.ask(images[0])
        assert time.monotonic() - start < 0.3 + 0.3
        assert (got.origin, got.label) == ("fallback", "c") and words in got.reason
        with pytest.raises(Unanswered, match=f"no answer|{words}"):
            Device(parts, url, deadline=0.3).ask(images[0])


def test_a_dead_server_is_left_alone_and_found_again(parts: Path, server: Service, images: np.ndarray) -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    dead = f"http://127.0.0.1:{silent.getsockname()[1]}"
    silent.close()
    device = Device(parts, dead, deadline=0.5, fallback="last")
    with pytest.raises(Unanswered, match=r"no answer from http://127\.0\.0\.1:\d+ in time: .*connect"):
        device.ask(images[0])  # there is no last answer yet
    times = []
    for _ in range(3):
        start = time.monotonic()
        with pytest.raises(Unanswered, match=r"failed a moment ago|connect|passed"):
            device.ask(images[0])
        times.append(time.monotonic() - start)
    assert min(times) < 0.3  # it does not knock each time
    device._link.url, device.deadline = server.address, 10.0  # it is back
    deadline = time.monotonic() + 30
    while True:
        with suppress(Unanswered):
            first = device.ask(images[0])
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    device._link.url, device.deadline = dead, 0.5
    device.close()
    got = device.ask(images[1])
    assert (got.origin, got.label) == ("last", first.label) and 0 < got.age < 10 and "connect" in got.reason
    assert (got.logits == first.logits).all()


def test_a_lost_request_is_sent_again(parts: Path, server: Service, images: np.ndarray) -> None:
    turns, asked = iter(("drop", "damage", "pass", "over")), []

    def relay(raw: socket.socket) -> None:
        said = bytearray(heard(raw))
        asked.append(next(line for line in bytes(said).split(b"\r\n") if line.startswith(b"idempotency-key")))
        turn = next(turns)
        if turn == "drop":
            return
        if turn == "damage":
            said[-2] ^= 1
        with server.connect() as onward:
            onward.sendall(said)
            raw.sendall(heard(onward))

    with peer(relay) as url:
        device = Device(parts, url, deadline=5)
        got = device.ask(images[0])
        assert got.origin == "server" and next(turns) == "over" and len(asked) == 3  # the third attempt
        assert len(set(asked)) == 1  # which the server can tell from another request
        alone = Device(parts, server.address, deadline=5).ask(images[0])
        assert np.allclose(got.logits, alone.logits, atol=1e-5) and got.sent > 2 * alone.sent
        device.close()


def test_of_a_stream_the_newest_is_answered_and_nothing_is_lost() -> None:
    going, let = threading.Event(), threading.Event()

    def slow(image: int) -> Any:
        going.set()
        assert let.wait(10)
        if image < 0:
            raise Unanswered("nobody there")
        return image

    stream = Newest(slow)
    first = stream.offer(0)
    going.wait(10)
    stale, failing = stream.offer(1), stream.offer(-1)
    let.set()
    assert first.result(10) == 0
    with pytest.raises(Superseded):
        stale.result(10)
    with pytest.raises(Unanswered, match="nobody"):
        failing.result(10)
    last = stream.offer(3)
    stream.close()
    assert last.result(0) == 3
    with pytest.raises(ValueError, match="closed"):
        stream.offer(4)


def test_another_codec_is_refused_at_once(parts: Path, server: Service, images: np.ndarray, tmp_path: Path) -> None:
    other, _ = export(student(seed=1), tmp_path / "other", spec=SPEC, labels=list("abcde"))
    start = time.monotonic()
    with pytest.raises(Unanswered, match="HTTP 409: the payload is for other parts"):
        Device(other, server.address, deadline=20).ask(images[0])
    assert time.monotonic() - start < 5  # it is not tried again


def test_a_device_needs_its_own_files_only(parts: Path, server: Service, images: np.ndarray, tmp_path: Path) -> None:
    for name in ("split.json", "codec.msgpack", "device.safetensors"):
        shutil.copy(parts / name, tmp_path)
    assert Device(tmp_path, server.address, deadline=10).ask(images[0]).origin == "server"
    told = json.loads((tmp_path / "split.json").read_text())
    for name, change, says in (
        ("device.safetensors", lambda raw: raw[:-1], "hash"),
        ("codec.msgpack", lambda raw: raw[:-3] + b"abc", "codec"),
        ("split.json", lambda raw: raw[:-9], "not a split model"),
        ("split.json", lambda raw: json.dumps(told | {"latent": [4, 9999, 9999]}).encode(), "does not fit"),
        ("split.json", lambda raw: json.dumps(told | {"more": 1}).encode(), "not a split model"),
    ):
        good = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(change(good))
        with pytest.raises(ArtifactError, match=says):
            Device(tmp_path, "http://127.0.0.1:1")
        (tmp_path / name).write_bytes(good)


def test_ctrl_c_finishes_what_has_begun(parts: Path, images: np.ndarray) -> None:
    with running(parts) as service, service.connect() as raw:
        device = Device(parts, service.address, deadline=10)
        said = request(device, images[0])
        head = {**said["headers"], "content-length": len(said["content"]), "connection": "close"}
        lines = "POST /logits HTTP/1.1\r\nhost: a\r\n" + "".join(f"{k}: {v}\r\n" for k, v in head.items()) + "\r\n"
        raw.sendall(lines.encode() + said["content"][:8])
        time.sleep(0.3)
        service.process.send_signal(2)
        time.sleep(0.3)
        raw.sendall(said["content"][8:])
        assert heard(raw).startswith(b"HTTP/1.1 200")
        assert service.process.wait(20) == 0 and service.process.stderr.read() == ""


def test_the_command_line_has_both_sides(
    parts: Path, server: Service, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(1).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    ask = ["predict", str(parts), str(tmp_path / "a.png")]
    assert cli.main([*ask, "--server", server.address, "--top", "2", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    want = Device(parts, server.address, deadline=10)(pixels)
    assert told["label"] == want.label and told["confidence"] == pytest.approx(want.confidence)
    assert len(told["top"]) == 2 and told["payload"] == want.payload
    for words, code, says in (
        (ask, 2, "give --server, the address of the other"),
        ([*ask, "--server", "127.0.0.1:9000"], 2, "url must be like http://127.0.0.1:9000"),
        ([*ask, "--server", "http://127.0.0.1:1", "--deadline", "0.2"], 1, "no answer from http://127.0.0.1:1 in time"),
        (["predict", str(parts / "server"), *ask[2:], "--server", server.address], 2, "has no split.json"),
    ):
        assert cli.main(words) == code
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


def test_wrong_use_is_one_line(parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(
            ["serve", str(parts / "server"), "--split", str(tmp_path / "again"), "--port", "1", "--host", "256.0.0.1"]
        )
        == 1
    )
    assert "cannot listen on 256.0.0.1:1" in capsys.readouterr().err
    assert read_parts(tmp_path / "again")[0] == read_parts(parts)[0]
    assert cli.main(["serve", str(tmp_path), "--split", str(tmp_path / "b")]) == 2
    with pytest.raises(ValueError, match="deadline must be positive"):
        Device(parts, "http://a:1", deadline=0)
    with pytest.raises(ValueError, match="fallback must be"):
        Device(parts, "http://a:1", fallback="first")
