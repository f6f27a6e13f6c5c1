"""`trimtab serve` against a bare loop over ONNX Runtime: what do HTTP, forms and batching cost, or gain?

    python -m benchmarks.serving

One file (ResNet-20, 32 x 32 pixels, random weights: its speed does not depend on them) and one picture of 64 x 48
pixels. The loop decodes the picture and runs the model, one at a time, in this process; the server does so for clients
on the loopback device, one or many at once, each sending its next picture when the last is answered. Contenders take
turns. The clients' own work is part of a served request: they and the server share the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

import trimtab as tt
from benchmarks.runner import compare
from trimtab.core import log
from trimtab.core.spec import InputSpec
from trimtab.data import preprocess
from trimtab.deploy import OnnxModel
from trimtab.testing import serving

RESULT = Path(__file__).parent / "results" / "serving.json"
SPEC = InputSpec((3, 32, 32), (0.5,) * 3, (0.25,) * 3)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=400, help="per contender and round")
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args(argv)
    log.setup(0)
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    encoded = io.BytesIO()
    Image.fromarray(noise).save(encoded, "JPEG")
    picture = encoded.getvalue()
    with tempfile.TemporaryDirectory() as folder:
        net = tt.create_model("resnet20_cifar", num_classes=10, seed=0)
        file = tt.export(net, Path(folder) / "net.onnx", spec=SPEC).path
        times: dict[str, list[float]] = {}
        with served(file) as (host, port):
            contenders: dict[str, Callable[[], int]] = {}
            for n in args.clients:
                name = f"served, {n} client{'s' * (n > 1)}"
                contenders[name] = _visitors(host, port, picture, n, args.pictures, times.setdefault(name, []))
            contenders["bare loop"] = _loop(OnnxModel(file), picture, args.pictures, times.setdefault("bare loop", []))
            result = compare(contenders, rounds=args.rounds, baseline="bare loop")
    for name, all_times in times.items():
        ms = [1e3 * t for t in all_times[args.pictures :]]  # the first turn is for warming up
        result.facts[name] = {
            "requests per second": round(args.pictures / result.series[name].median, 1),
            "p50 ms": round(statistics.median(ms), 3),
            "p99 ms": round(statistics.quantiles(ms, n=100)[98], 3),
        }
    result.facts |= {"pictures": args.pictures, "picture bytes": len(picture), "model": "resnet20_cifar, 1 thread"}
    result.show(f"{args.pictures} pictures")
    result.save(args.out)


@contextmanager
def served(file: Path) -> Iterator[tuple[str, int]]:
    """A server process; gives its host and port."""
    with serving(file) as (_, address):
        url = urlsplit(address)
        assert url.hostname is not None and url.port is not None
        yield url.hostname, url.port


def _loop(model: OnnxModel, picture: bytes, pictures: int, times: list[float]) -> Callable[[], int]:
    def run() -> int:
        for _ in range(pictures):
            start = time.perf_counter()
            model.logits(preprocess(picture, model.spec)[None])
            times.append(time.perf_counter() - start)
        return pictures

    return run


def _visitors(host: str, port: int, picture: bytes, n: int, pictures: int, times: list[float]) -> Callable[[], int]:
    """Clients that speak just enough HTTP, so that what is measured is the server."""
    head = f"POST /predict?top=1 HTTP/1.1\r\nHost: {host}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}"
    message = head.encode() + b"\r\n\r\n" + picture

    async def visit(left: list[None]) -> None:
        reader, writer = await asyncio.open_connection(host, port)
        while left:
            left.pop()
            start = time.perf_counter()
            writer.write(message)
            answer = await reader.readuntil(b"\r\n\r\n")
            if not answer.startswith(b"HTTP/1.1 200 "):
                raise RuntimeError(f"the server answered {answer[:200]!r}")
            length = next(h for h in answer.lower().split(b"\r\n") if h.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
            times.append(time.perf_counter() - start)
        writer.close()

    async def visit_all() -> None:
        left: list[Any] = [None] * pictures
        await asyncio.gather(*(visit(left) for _ in range(n)))

    def run() -> int:
        asyncio.run(visit_all())
        return pictures

    return run


if __name__ == "__main__":
    main()
