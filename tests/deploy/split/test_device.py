"""Two processes and a real socket: the answer of the whole network, in time, whatever the other side does."""

from __future__ import annotations

import json
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.deploy.serve.service import Service, running
from tests.deploy.split.conftest import SPEC, student
from trimtab import cli
from trimtab.core.errors import ArtifactError
from trimtab.deploy.split import frame
from trimtab.deploy.split.device import Device, Newest, Superseded
from trimtab.deploy.split.frame import Frame
from trimtab.deploy.split.parts import export, read_parts
from trimtab.deploy.split.peers import Unanswered


@pytest.fixture(scope="module")
def server(parts: Path) -> Iterator[Service]:
    with running(parts) as service:
        yield service
        assert service.process.poll() is None  # nothing that the tests sent has brought it down


def address(server: Service) -> tuple[str, int]:
    host, _, port = server.address.rpartition(":")
    return host, int(port)


def test_the_answer_is_that_of_the_whole_network(parts: Path, server: Service, images: np.ndarray) -> None:
    device = Device(parts, address(server), deadline=10)
    with torch.no_grad():
        want = student()(torch.from_numpy(images)).numpy()
    for x, logits in zip(images, want):
        got = device.ask(x)
        assert got.origin == "server" and np.allclose(got.logits, logits, atol=1e-4)
        assert got.label == "abcde"[logits.argmax()] and got.confidence == pytest.approx(
            np.exp(logits).max() / np.exp(logits).sum(), rel=1e-3
        )
    assert got.payload % 4 == 0 and got.payload < got.sent < got.payload + 64  # the header is small
    assert got.total_ms >= got.server_ms > 0 and got.encode_ms > 0
    assert device((images[0].transpose(1, 2, 0) * 20 + 128).clip(0, 255).astype(np.uint8)).origin == "server"


def test_both_processes_have_the_same_numbers(parts: Path, server: Service, images: np.ndarray) -> None:
    device = Device(parts, address(server), deadline=10)
    for x in images:
        symbols = device.symbols(x)
        assert len(np.unique(symbols)) > 5
        assert (device.echo(x) == symbols).all()


def talk(raw: socket.socket, *said: Frame) -> Frame:
    until = time.monotonic() + 10
    for each in said:
        frame.send(raw, each, until)
        answer = frame.receive(raw, until)
    return answer


def test_the_server_refuses_nonsense_and_goes_on(parts: Path, server: Service, images: np.ndarray) -> None:
    hello = Frame({"v": 1, **read_parts(parts)[0].hello, "session": "s"})
    shape = {"shape": [4, 15, 15]}
    for nonsense in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"TTS1\xff\xff\xff\xff",
        b"",
        b"TTS1\0\0\0\x08abcdefgh",
        frame.pack(hello)[:-1],
    ):
        with socket.create_connection(address(server), timeout=20) as raw:
            raw.sendall(nonsense)
            raw.shutdown(socket.SHUT_WR)
            answer = raw.recv(4096)
            assert answer == b"" or b"corrupt" in answer
    with socket.create_connection(address(server), timeout=20) as raw:
        answer = talk(raw, Frame({**hello.header, "codec": "another"}))
        assert answer.header["status"] == "mismatch" and answer.header["reason"] == "another codec"
        assert answer.header["codec"] == hello.header["codec"] and raw.recv(1) == b""
    for request, status in (
        (Frame({"id": 1, "ms": 1e4, "shape": [4, 4000, 4000]}), "corrupt"),
        (Frame({"id": 1, "ms": 1e4, **shape}, b"abc"), "corrupt"),
        (Frame({"id": 1, "ms": 0, **shape}), "late"),
        (Frame({"id": "x", "ms": 1e4}), "corrupt"),
        (Frame({}), "corrupt"),
    ):
        with socket.create_connection(address(server), timeout=20) as raw:
            assert talk(raw, hello, request).header["status"] == status
    assert Device(parts, address(server), deadline=10).ask(images[0]).origin == "server"


def test_a_request_that_comes_again_gets_the_same_answer_without_work(
    parts: Path, server: Service, images: np.ndarray
) -> None:
    device = Device(parts, address(server), deadline=10)
    hello = Frame({"v": 1, **device.parts.hello, "session": "again"})
    request = Frame({"id": 5, "ms": 1e4, "shape": [4, 15, 15]}, device.codec.encode(device.symbols(images[0])))
    other = Frame(request.header, device.codec.encode(device.symbols(images[1])))
    with socket.create_connection(address(server), timeout=20) as raw:
        first = talk(raw, hello, request)
    with socket.create_connection(address(server), timeout=20) as raw:  # another connection of the same session
        assert talk(raw, hello, other) == first
    with socket.create_connection(address(server), timeout=20) as raw:
        assert talk(raw, Frame({**hello.header, "session": "new"}), other) != first


@contextmanager
def peer(behave: Callable[[socket.socket], None]) -> Iterator[tuple[str, int]]:
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
        yield listening.getsockname()
    finally:
        listening.shutdown(socket.SHUT_RDWR)
        listening.close()


def greet(raw: socket.socket) -> Frame:
    until = time.monotonic() + 5
    frame.receive(raw, until)
    frame.send(raw, Frame({"status": "ok"}), until)
    return frame.receive(raw, until)


def dribble(raw: socket.socket) -> None:
    greet(raw)
    for byte in frame.pack(Frame({"id": 1, "status": "ok"}, bytes(5000))):
        raw.sendall(bytes([byte]))
        time.sleep(0.02)


def answering(payload: bytes, **header: Any) -> Callable[[socket.socket], None]:
    def behave(raw: socket.socket) -> None:
        asked = greet(raw)
        frame.send(raw, Frame({"id": asked.header["id"], "status": "ok"} | header, payload), time.monotonic() + 5)
        raw.recv(1)

    return behave


BAD_PEERS: dict[str, tuple[Callable[[socket.socket], None], str]] = {
    "silent": (lambda raw: time.sleep(1.0), "too slow"),
    "hangs up": (lambda raw: raw.recv(4096) and None, "hung up"),
    "hangs up after greeting": (lambda raw: greet(raw) and None, "hung up"),
    "a dribble": (dribble, "too slow"),
    "HTTP": (lambda raw: raw.sendall(b"HTTP/1.1 200 OK\r\n\r\n"), "not a frame"),
    "a huge frame": (lambda raw: raw.sendall(b"TTS1" + struct.pack(">I", 2**31) + bytes(100)), "at most 1048576 bytes"),
    "noise": (lambda raw: raw.sendall(b"TTS1\0\0\0\x10" + bytes(16)), "checksum"),
    "another id": (answering(bytes(20), id=99), "not asked"),
    "too few logits": (answering(bytes(8)), "no list of finite logits"),
    "no numbers": (answering(b"\xff" * 20), "no list of finite logits"),
    "an error": (answering(b"", status="error", reason="out of memory"), "out of memory"),
}


@pytest.mark.parametrize("name", BAD_PEERS)
def test_a_bad_peer_costs_the_deadline_and_nothing_else(parts: Path, images: np.ndarray, name: str) -> None:
    behave, words = BAD_PEERS[name]
    with peer(behave) as where:
        device = Device(parts, where, deadline=0.3, fallback=lambda x: np.array([0, 0, 9, 0, 0]))
        start = time.monotonic()
        got = device.ask(images[0])
        assert time.monotonic() - start < 0.3 + 0.3
        assert (got.origin, got.label) == ("fallback", "c") and words in got.reason
        with pytest.raises(Unanswered, match=f"no answer|{words}"):
            Device(parts, where, deadline=0.3).ask(images[0])


def test_a_dead_server_is_left_alone_and_found_again(parts: Path, server: Service, images: np.ndarray) -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    port = silent.getsockname()[1]
    silent.close()
    device = Device(parts, ("127.0.0.1", port), deadline=0.5, fallback="last")
    with pytest.raises(Unanswered, match="refused"):  # there is no last answer yet
        device.ask(images[0])
    times = []
    for _ in range(3):
        start = time.monotonic()
        with pytest.raises(Unanswered, match=r"failed a moment ago|refused|passed"):
            device.ask(images[0])
        times.append(time.monotonic() - start)
    assert min(times) < 0.3  # it does not knock each time
    device._link.address = address(server)  # it is back
    deadline = time.monotonic() + 10
    while True:
        with suppress(Unanswered):
            first = device.ask(images[0])
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    device._link.address = ("127.0.0.1", port)
    device.close()
    got = device.ask(images[1])
    assert (got.origin, got.label) == ("last", first.label) and 0 < got.age < 10 and "refused" in got.reason
    assert (got.logits == first.logits).all()


def test_a_lost_frame_is_sent_again(parts: Path, server: Service, images: np.ndarray) -> None:
    turns = iter(("drop", "damage", "pass", "pass"))

    def relay(raw: socket.socket) -> None:
        turn = next(turns)
        if turn == "drop":
            return
        with socket.create_connection(address(server)) as onward:
            until = time.monotonic() + 5
            frame.send(onward, frame.receive(raw, until), until)
            frame.send(raw, frame.receive(onward, until), until)
            request = bytearray(frame.pack(frame.receive(raw, until)))
            if turn == "damage":
                request[30] ^= 1
            onward.sendall(request)
            frame.send(raw, frame.receive(onward, until), until)
            raw.recv(1)

    with peer(relay) as where:
        device = Device(parts, where, deadline=5)
        got = device.ask(images[0])
        assert got.origin == "server" and next(turns) == "pass"  # the third attempt
        assert np.allclose(got.logits, Device(parts, address(server), deadline=5).ask(images[0]).logits)
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
    with pytest.raises(Unanswered, match="'mismatch': another codec, model"):
        Device(other, address(server), deadline=20).ask(images[0])
    assert time.monotonic() - start < 5  # it is not tried again


def test_a_device_needs_its_own_files_only(parts: Path, server: Service, images: np.ndarray, tmp_path: Path) -> None:
    for name in ("split.json", "codec.msgpack", "device.safetensors"):
        shutil.copy(parts / name, tmp_path)
    assert Device(tmp_path, address(server), deadline=10).ask(images[0]).origin == "server"
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
            Device(tmp_path, ("127.0.0.1", 1))
        (tmp_path / name).write_bytes(good)


def test_ctrl_c_ends_the_server_well(parts: Path) -> None:
    with running(parts) as service:
        assert service.stop() == 0 and service.process.stderr.read() == ""


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
        Device(parts, ("a", 1), deadline=0)
    with pytest.raises(ValueError, match="fallback must be"):
        Device(parts, ("a", 1), fallback="first")
