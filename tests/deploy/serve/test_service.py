"""A real server process answers as the file does, and refuses everything else in words."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import socket
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

import trimtab as tt
from tests.deploy.serve.conftest import HOSTILE, LABELS, SPEC
from tests.deploy.serve.service import Service, bomb, picture, running
from tests.deploy.wire import heard
from trimtab import cli
from trimtab.core.errors import ArtifactError, MissingExtra
from trimtab.deploy import OnnxModel
from trimtab.deploy.serve import Limits, create_app
from trimtab.deploy.serve.server import opened
from trimtab.models.factory import shape_for

PNG = {"content-type": "image/png"}


def test_answers_what_the_file_answers(client: httpx.Client, colour: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(picture("red", (90, 40), "JPEG"))
    want = OnnxModel(colour).predict(tmp_path / "a.jpg")[0]
    raw = (tmp_path / "a.jpg").read_bytes()
    for answer in (
        client.post("/predict", files={"file": ("a.jpg", raw)}),
        client.post("/predict", files={"whatever": ("a", raw)}, data={"note": "a field more"}),
        client.post("/predict", content=raw, headers={"content-type": "image/jpeg"}),
        client.post("/predict", content=iter([raw[:100], raw[100:]]), headers=PNG),  # chunked; the bytes count
    ):
        assert answer.status_code == 200, answer.text
        got = answer.json()
        assert (got["task"], got["label"]) == ("classify", "red")
        assert got["confidence"] == pytest.approx(want.confidence)
        assert [(g["label"], g["confidence"]) for g in got["top"]] == [(n, pytest.approx(p)) for n, p in want.top]
    assert len(client.post("/predict?top=1", content=raw, headers=PNG).json()["top"]) == 1


def test_health_says_what_is_served(client: httpx.Client) -> None:
    got = client.get("/health").json()
    assert got["status"] == "ok" and got["model"] == "colour.onnx" and got["input"] == [3, 16, 16]
    assert (got["labels"], got["max_bytes"], got["max_pixels"]) == (3, 200_000, 1_000_000)


def too_long() -> Iterator[bytes]:
    yield from itertools.repeat(bytes(10_000), 30)


BROKEN_FORM = {"content-type": "multipart/form-data; boundary=x"}
REFUSED: dict[str, tuple[int, str, dict[str, Any]]] = {
    "nothing": (400, "empty", {"content": b"", "headers": PNG}),
    "an empty file": (400, "empty", {"files": {"file": b""}}),
    "a form without a file": (400, "no file", {"files": {"file": (None, b"text")}}),
    "two files": (400, "Too many files", {"files": {"a": b"x", "b": b"y"}}),
    "a form that ends early": (400, "", {"content": b"--x\r\nContent-Disposition: form-data;", "headers": BROKEN_FORM}),
    "no boundary": (400, "boundary", {"content": b"--x", "headers": {"content-type": "multipart/form-data"}}),
    "another type": (415, "not text/plain", {"content": b"hello", "headers": {"content-type": "text/plain"}}),
    "no type": (415, "send a form", {"content": b"hello"}),
    "text as a picture": (415, "known format", {"content": b"hello" * 50, "headers": PNG}),
    "a program as a picture": (415, "known format", {"content": b"%!PS-Adobe-3.0 EPSF\n", "headers": PNG}),
    "half a PNG": (422, "truncated", {"content": picture()[:-30], "headers": PNG}),
    "half a JPEG": (422, "truncated", {"content": picture("red", (300, 300), "JPEG")[:900], "headers": PNG}),
    "many pixels": (413, "limit 1 million", {"content": bomb(1100, 1000), "headers": PNG}),
    "a bomb": (413, "too many pixels", {"content": bomb(50_000, 50_000), "headers": PNG}),
    "a body too long": (413, "200,000", {"content": bytes(300_000), "headers": PNG}),
    "a stream too long": (413, "200,000", {"content": too_long, "headers": PNG}),
    "a form too long": (413, "200,000", {"files": {"file": bytes(300_000)}}),
    "no answers": (422, "top", {"content": picture(), "headers": PNG, "params": {"top": 0}}),
    "some answers": (422, "top", {"content": picture(), "headers": PNG, "params": {"top": "some"}}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_refused_with_a_reason(client: httpx.Client, name: str) -> None:
    status, reason, request = REFUSED[name]
    request = {k: v() if callable(v) else v for k, v in request.items()}
    answer = client.post("/predict", **request)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"} and reason in answer.json()["error"]
    assert client.post("/predict", content=picture(), headers=PNG).json()["label"] == "green"


def test_other_paths_methods_and_protocols(client: httpx.Client, service: Service) -> None:
    assert client.get("/predict").status_code == 405 and client.get("/predict").headers["allow"] == "POST"
    assert client.get("/nowhere").json() == {"error": "Not Found"}
    for garbage in (
        b"\x16\x03\x01\x00\xa5\x01",
        b"GET\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    ):
        with service.connect() as raw:
            raw.sendall(garbage + b"\r\n\r\n")
            assert received(raw).startswith(b"HTTP/1.1 400 ")


def received(raw: socket.socket) -> bytes:
    """Everything until the server hangs up."""
    parts = []
    while part := raw.recv(65536):
        parts.append(part)
    return b"".join(parts)


HEAD = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/png\r\nContent-Length: %d\r\n"


def test_slow_clients_are_told_so_and_nobody_waits_for_them(client: httpx.Client, service: Service) -> None:
    with (
        service.connect() as silent,
        service.connect() as head,
        service.connect() as body,
        service.connect() as refused,
    ):
        head.sendall(HEAD % 99)
        body.sendall(HEAD % 99 + b"\r\n" + bytes(50))
        refused.sendall(HEAD % 999_999 + b"\r\n")
        assert client.post("/predict", content=picture(), headers=PNG).status_code == 200
        assert b"408 " in received(head).split(b"\r\n")[0]
        assert b"not complete within 2 seconds" in (late := heard(body)) and b" 408 " in late.split(b"\r\n")[0]
        assert b" 413 " in heard(refused)  # at once, and then:
        deadline = time.monotonic() + 8
        with pytest.raises(OSError):  # a dribble does not keep the connection open
            while time.monotonic() < deadline:
                refused.sendall(b"x")
                time.sleep(0.1)
        assert received(silent) == b""
    assert client.get("/health").status_code == 200


def test_too_many_at_once_are_told_to_come_back(client: httpx.Client, service: Service) -> None:
    image = picture("red")
    held = [service.connect() for _ in range(8)]
    try:
        for raw in held:
            raw.sendall(HEAD % len(image) + b"Connection: close\r\n\r\n" + image[:50])
        deadline = time.monotonic() + 2
        while (answer := client.post("/predict", content=image, headers=PNG)).status_code == 200:
            assert time.monotonic() < deadline
        assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        assert answer.json()["error"] == "8 requests are being worked on; try again"
        for raw in held:
            raw.sendall(image[50:])
        assert [json.loads(received(raw).split(b"\r\n\r\n")[1])["label"] for raw in held] == ["red"] * 8
    finally:
        for raw in held:
            raw.close()


def metrics(client: httpx.Client) -> dict[str, float]:
    samples = [s for family in text_string_to_metric_families(client.get("/metrics").text) for s in family.samples]
    return {s.name + "".join(f" {v}" for v in s.labels.values()): s.value for s in samples}


def test_load_is_batched_counted_and_everybody_gets_his_own_answer(client: httpx.Client, service: Service) -> None:
    images = {label: picture(name) for label, name in zip(LABELS, ("red", "green", "blue"))}
    before = metrics(client)

    def visit(turn: int) -> list[float]:
        times = []
        with httpx.Client(base_url=service.address, timeout=20, trust_env=False) as own:
            for i in range(40):
                label = LABELS[(turn + i) % 3]
                start = time.perf_counter()
                answer = own.post("/predict", content=images[label], headers=PNG)
                times.append(time.perf_counter() - start)
                assert answer.status_code == 200 and answer.json()["label"] == label
        return times

    with ThreadPoolExecutor(8) as pool:
        times = [t for own in pool.map(visit, range(8)) for t in own]
    after = metrics(client)
    rise = {k: after[k] - before.get(k, 0.0) for k in after}
    assert rise["trimtab_requests_total /predict 200"] == rise["trimtab_batch_size_sum"] == 320
    assert rise["trimtab_batch_size_count"] == rise["trimtab_model_seconds_count"] < 320  # some shared a batch
    assert rise["trimtab_request_seconds_count /predict"] == 320 and after["trimtab_requests_inside"] == 0
    assert statistics.quantiles(times, n=100)[98] < 1.0


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/predict"])
def test_keeps_what_its_openapi_document_says(service: Service, path: str) -> None:
    import schemathesis
    from schemathesis.checks import CHECKS, load_all_checks

    load_all_checks()
    unfit = CHECKS.get_by_names(["positive_data_acceptance"])  # any bytes fit the schema; few are pictures
    document = schemathesis.openapi.from_url(f"{service.address}/openapi.json")
    operations = [found.ok() for found in document.include(path=path).get_all_operations()]
    assert len(operations) == 1

    @given(case=operations[0].as_strategy())
    @settings(max_examples=25, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    def conforms(case: Any) -> None:
        case.call_and_validate(excluded_checks=unfit)

    conforms()


def test_ctrl_c_finishes_what_has_begun(colour: Path) -> None:
    image = picture("green")
    with running(colour, "--seconds", "5") as service, service.connect() as raw:
        raw.sendall(HEAD % len(image) + b"\r\n" + image[:50])
        time.sleep(0.3)
        service.process.send_signal(2)
        time.sleep(0.4)
        raw.sendall(image[50:])
        assert b'"label":"green"' in received(raw)
        assert service.process.wait(10) == 0
        with pytest.raises(OSError):
            service.connect()
        assert service.process.stderr.read() == ""


def test_an_artifact_is_served_as_its_export(tmp_path: Path) -> None:
    net = tt.create_model("trim_1k", num_classes=3, in_chans=3)
    tt.save(net, tmp_path / "kept", spec=SPEC, labels=LABELS)
    model = opened(tmp_path / "kept")
    assert (model.name, model.task, model.size, model.labels) == ("kept.onnx", "classify", SPEC.size, LABELS)
    assert create_app(model).openapi()["paths"].keys() == {"/", "/health", "/metrics", "/predict"}
    tt.save(net, tmp_path / "bare")
    with pytest.raises(ArtifactError, match="does not say what input"):
        opened(tmp_path / "bare")


@pytest.mark.parametrize(("task", "name"), [("segment", "lite_fpn"), ("detect", "ssd_nano"), ("restore", "espcn_x2")])
def test_other_tasks_are_served(task: str, name: str, tmp_path: Path) -> None:
    data = tt.load_data("scenes:classes=2,size=32,n=30", task=task, **({"scale": 2} if task == "restore" else {}))
    net = tt.create_model(name, **shape_for(data))
    tt.export(net, tmp_path / "net.onnx", data=data, exporter="classic", check=False)
    with running(tmp_path / "net.onnx") as service, httpx.Client(base_url=service.address, timeout=20) as client:
        assert client.get("/health").json()["task"] == task
        answers = [client.post("/predict", content=picture(size=s), headers=PNG) for s in ((40, 30), (24, 52))]
        told = [a.json() for a in answers]
        assert [a.status_code for a in answers] == [200, 200] and {t["task"] for t in told} == {task}
        for value, (w, h) in zip(told, ((40, 30), (24, 52))):
            if task == "segment":
                mask = Image.open(io.BytesIO(base64.b64decode(value["mask"])))
                assert mask.size == (w, h) and sum(c["share"] for c in value["classes"]) == pytest.approx(1)
            elif task == "detect":
                assert all(0 <= v <= max(w, h) for o in value["objects"] for v in o["box"])
            else:
                large = Image.open(io.BytesIO(base64.b64decode(value["picture"])))
                assert list(large.size) == value["size"] == [2 * w, 2 * h]
        if task == "restore":
            assert client.post("/predict", content=picture(size=(1200, 1000)), headers=PNG).status_code == 413


def test_wrong_use_is_one_line(colour: Path, capsys: pytest.CaptureFixture[str], service: Service) -> None:
    port = service.address.rpartition(":")[2]
    for args, code, says in (
        (["resnet8_mlperf_tiny"], 2, "a bare name knows no weights"),
        (["no/such.onnx"], 2, "there is no file"),
        ([str(colour), "--port", "70000"], 2, "--port"),
        ([str(colour), "--port", port], 1, f"cannot listen on 127.0.0.1:{port}: Address already in use"),
    ):
        assert cli.main(["serve", *args]) == code
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and says in error
    with pytest.raises(ValueError, match="max_pixels must be positive, got 0"):
        Limits(max_pixels=0)


def test_without_the_extra_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.startswith("trimtab.deploy.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(MissingExtra, match=re.escape("pip install 'trimtab[serve]'")):
        import trimtab.deploy.serve  # noqa: F401


@pytest.mark.browser
def test_the_page_names_a_dropped_picture_and_says_what_is_wrong(browser: Any, service: Service) -> None:
    problems: list[str] = []
    page = browser.new_page()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(service.address)
    page.get_by_text("colour.onnx: classify, 3 classes, input 16 × 16").wait_for()
    page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": picture("blue")})
    page.locator("#answers li").nth(2).wait_for()
    assert page.locator("#answers li").first.inner_text() == f"{HOSTILE}\n78.7 %"
    assert page.evaluate("window.hacked") is None and page.evaluate("document.querySelectorAll('li img').length") == 0
    assert "Answered in" in page.locator("#took").inner_text() and page.locator("#shown").is_visible()
    page.evaluate(
        """bytes => { const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(bytes)], "b.png", { type: "image/png" }));
        document.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })) }""",
        list(picture("red")),
    )
    page.locator("#answers li").first.get_by_text("red").wait_for()
    for wrong, words in ((b"no picture", "not an image of a known format"), (bytes(300_000), "larger than 200000")):
        page.set_input_files("#file", {"name": "c.png", "mimeType": "image/png", "buffer": wrong})
        page.locator("#error").get_by_text(words).wait_for()
        assert page.locator("#answers li").count() == 0
    assert problems == []
    page.close()
