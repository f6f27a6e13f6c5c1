"""Two networks and a memory in ONNX Runtime: the first answers, the second is asked when the first is unsure.

`CascadeModel` runs a folder that `Pair.save` has written. Its parts are of use alone: `confidence`, `Gate`,
fingerprints of images, and `ResultCache`, the bounded memory of past answers. Nothing here needs PyTorch.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trimtab.core.errors import ArtifactError
from trimtab.core.spec import InputSpec
from trimtab.deploy.runtime import OnnxModel, Predictor, renormalise, softmax

CASCADE = "cascade.json"
FILES = ("first.onnx", "second.onnx")
SCORES = ("maxp", "difference", "entropy")
MAX_BYTES = 2**20  # of cascade.json


def confidence(logits: np.ndarray, score: str = "difference") -> np.ndarray:
    """How sure a network is, (B, K) -> (B,), from 0 to 1.

    "maxp" is the largest probability, "difference" the largest minus the second, "entropy" one minus the entropy as a
    share of the largest possible, ln K.

    >>> confidence(np.log([[0.5, 0.3, 0.2]])).round(2), confidence(np.zeros((1, 4)), "entropy").round(2)
    (array([0.2]), array([0.]))
    """
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}, got {score!r}")
    p = softmax(logits)
    if score == "entropy":
        return np.clip(1 + (p * np.log(np.clip(p, 1e-300, None))).sum(-1) / np.log(p.shape[-1]), 0, 1)
    top = np.sort(p, -1)
    return top[:, -1] if score == "maxp" else top[:, -1] - top[:, -2]


@dataclass(frozen=True)
class Gate:
    """When the second network is asked, and which answer counts then.

    Attributes:
        score: see `confidence`.
        threshold: the second is asked where the first's confidence is below.
        post_check: then the surer of both answers; without it the second.
        temperatures: what the logits of each are divided by first.
    """

    score: str = "difference"
    threshold: float = 0.5
    post_check: bool = False
    temperatures: tuple[float, float] = (1.0, 1.0)

    def unsure(self, first: np.ndarray) -> np.ndarray:
        """Which rows of the first network's logits (B, K) the second is asked about: bool (B,)."""
        return confidence(first / self.temperatures[0], self.score) < self.threshold

    def second_wins(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Whose answer counts, where both have been asked: bool (B,)."""
        if not self.post_check:
            return np.ones(len(first), bool)
        a, b = (confidence(x / t, self.score) for x, t in zip((first, second), self.temperatures))
        return np.asarray(b > a)


# ------------------------------------------------------------------------------------------------------------- memory


def dhash(image: np.ndarray, *, down: bool = False) -> int:
    """64 bits of the shape of light in a uint8 image (H, W), (H, W, 1) or (H, W, 3): is a place darker than its right
    neighbour (with `down`, than the one below), on a grey 9 x 8 version of it?

    >>> dhash(np.tile(np.arange(90, dtype=np.uint8), (80, 1))) == 2**64 - 1
    True
    """
    grey = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image).convert("L")
    small = np.asarray(grey.resize((8, 9) if down else (9, 8), Image.Resampling.BILINEAR), np.int16)
    bits = small[1:] > small[:-1] if down else small[:, 1:] > small[:, :-1]
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@dataclass(frozen=True)
class Answer:
    """What is remembered: the logits (K,), the confidence, and which network said it (0 or 1)."""

    logits: np.ndarray
    confidence: float
    origin: int


@dataclass
class ResultCache:
    """The memory of past answers: bounded, the least recently used go first.

    Args:
        capacity: answers that are kept.
        perceptual: images with equal `dhash` are the same, if their second hash (of vertical neighbours) is equal too;
            otherwise only images that are equal bit by bit.
        radius: bits in which each of both hashes may differ. Near images get the same answer, right or wrong.
        ttl: seconds that an answer is good for.
        least: answers of lower confidence are not kept.
        version: of networks and preparation; part of every key.
        clock: tells the time in seconds.

    Attributes:
        hits, misses, evictions: counts.
    """

    capacity: int = 1024
    perceptual: bool = False
    radius: int = 0
    ttl: float | None = None
    least: float = 0.0
    version: str = ""
    clock: Callable[[], float] = time.monotonic
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    _held: OrderedDict[Hashable, tuple[Answer, float]] = field(default_factory=OrderedDict, repr=False)

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"capacity must be at least 1, got {self.capacity}")
        if not 0 <= self.radius <= 16:
            raise ValueError(f"radius must be 0 to 16 bits, got {self.radius}")
        if self.radius and not self.perceptual:
            raise ValueError("radius needs perceptual=True")
        if self.ttl is not None and self.ttl <= 0:
            raise ValueError(f"ttl must be positive, got {self.ttl}")
        if not 0 <= self.least <= 1:
            raise ValueError(f"least must be 0 to 1, got {self.least}")

    def __len__(self) -> int:
        return len(self._held)

    def key(self, image: np.ndarray, pixels: Callable[[], np.ndarray]) -> Hashable:
        """The key of a prepared image (C, H, W); `pixels` gives it as uint8 (H, W, C)."""
        if not self.perceptual:
            return self.version, hashlib.blake2b(image.tobytes(), digest_size=16).digest()
        plain = pixels()
        return self.version, dhash(plain), dhash(plain, down=True)

    def get(self, key: Hashable) -> Answer | None:
        """What was said to this image, None if nothing is known (any more)."""
        found = self._near(key)
        if found is not None:
            answer, until = self._held[found]
            if until > self.clock():
                self._held.move_to_end(found)
                self.hits += 1
                return answer
            del self._held[found]
        self.misses += 1
        return None

    def put(self, key: Hashable, answer: Answer) -> None:
        """Remember an answer, if it is sure enough."""
        if answer.confidence < self.least:
            return
        self._held[key] = answer, self.clock() + self.ttl if self.ttl is not None else float("inf")
        self._held.move_to_end(key)
        if len(self._held) > self.capacity:
            self._held.popitem(last=False)
            self.evictions += 1

    def clear(self) -> None:
        """Forget everything."""
        self._held.clear()

    def _near(self, key: Any) -> Hashable | None:
        if key in self._held or not self.radius:
            return key if key in self._held else None
        keys: list[Any] = list(self._held)
        for held in keys:
            if held[0] == key[0] and all((a ^ b).bit_count() <= self.radius for a, b in zip(held[1:], key[1:])):
                return held
        return None


# ---------------------------------------------------------------------------------------------------------------- files


class Member(BaseModel):
    """A network of the cascade, and what one image costs it."""

    model_config = ConfigDict(extra="forbid")
    name: str
    sha256: str
    macs: int = Field(ge=0)
    params: int = Field(ge=0)
    joules: float = Field(ge=0)


class Manifest(BaseModel):
    """The content of `cascade.json`."""

    model_config = ConfigDict(extra="forbid")
    schema_version: Literal[1] = 1
    spec: dict[str, Any]
    labels: list[str] | None = None
    score: Literal["maxp", "difference", "entropy"]
    threshold: float
    post_check: bool
    temperatures: tuple[float, float]
    members: tuple[Member, Member]
    figures: dict[str, Any] = Field(default_factory=dict)


class CascadeModel(Predictor):
    """The two networks of a folder, with a memory in front.

    Args:
        path: the folder.
        cache: the memory; None for none. Its version becomes that of the files.
        threads: threads of one call.

    Attributes:
        spec, labels: the input, and the names of the classes.
        gate: when the second network is asked; may be replaced by one with another threshold.
        calls: images that each network has seen.
        figures: what was measured when the pair was chosen.

    Raises:
        ArtifactError: a file is missing, damaged, or not the one that was written.
    """

    def __init__(self, path: str | os.PathLike[str], *, cache: ResultCache | None = None, threads: int = 1) -> None:
        self.path = Path(path)
        manifest, self.spec = _read(self.path)
        self.members, self.figures = manifest.members, manifest.figures
        self.gate = Gate(manifest.score, manifest.threshold, manifest.post_check, manifest.temperatures)
        self.models = []
        for name, member in zip(FILES, self.members):
            file = self.path / name
            if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != member.sha256:
                raise ArtifactError(f"{file} is missing, or not the file that was written")
            self.models.append(OnnxModel(file, threads=threads))
            if self.models[-1].spec.size != self.spec.size:
                raise ArtifactError(f"{file} takes images {self.models[-1].spec.size}, not {self.spec.size}")
        self.labels = manifest.labels or self.models[0].labels
        self.cache = cache
        if cache is not None:
            cache.version = hashlib.sha256((self.path / CASCADE).read_bytes()).hexdigest()[:16]
        self.calls = [0, 0]

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Logits (B, K) of the network whose answer counts, for prepared float32 images (B, C, H, W)."""
        images = np.ascontiguousarray(images, dtype=np.float32)
        if images.ndim != 4 or images.shape[1:] != tuple(self.spec.size):
            want = ", ".join(map(str, self.spec.size))
            raise ValueError(f"images must be (B, {want}), got {images.shape}")
        if self.cache is None:
            return self._rows(self._answers(images))
        keys = [self.cache.key(image, lambda image=image: self._pixels(image)) for image in images]  # type: ignore[misc]
        found: list[Answer | None] = []
        asked: dict[Hashable, list[int]] = {}  # rows of images that are new, those alike within the batch together
        for row, key in enumerate(keys):
            if key in asked:
                self.cache.hits += 1
                found.append(None)
            else:
                found.append(self.cache.get(key))
            if found[-1] is None:
                asked.setdefault(key, []).append(row)
        if asked:
            answers = self._answers(images[[rows[0] for rows in asked.values()]])
            for (key, rows), answer in zip(asked.items(), answers):
                self.cache.put(key, answer)
                for row in rows:
                    found[row] = answer
        return self._rows([a for a in found if a is not None])

    def _rows(self, answers: Sequence[Answer]) -> np.ndarray:
        return np.stack([a.logits for a in answers]) if answers else np.empty((0, len(self.labels)), np.float32)

    def joules(self) -> float:
        """Energy of all calls so far, by the table of `core.energy` (an estimate; the memory's own is left out)."""
        return sum(n * m.joules for n, m in zip(self.calls, self.members))

    def _answers(self, images: np.ndarray) -> list[Answer]:
        """Both networks and the gate, without the memory."""
        first = self._run(0, images)
        unsure = np.flatnonzero(self.gate.unsure(first))
        out, origin = first / self.gate.temperatures[0], np.zeros(len(images), np.int64)
        if len(unsure):
            second = self._run(1, images[unsure])
            wins = self.gate.second_wins(first[unsure], second)
            out[unsure[wins]] = second[wins] / self.gate.temperatures[1]
            origin[unsure[wins]] = 1
        sure = confidence(out, self.gate.score) if len(out) else np.zeros(0)
        return [Answer(o, float(s), int(w)) for o, s, w in zip(out, sure, origin)]

    def _run(self, which: int, images: np.ndarray) -> np.ndarray:
        self.calls[which] += len(images)
        return self.models[which].logits(renormalise(images, self.spec, self.models[which].spec))

    def _pixels(self, image: np.ndarray) -> np.ndarray:
        mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (self.spec.mean, self.spec.std))
        return np.rint(np.clip(image * std + mean, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)


def _read(folder: Path) -> tuple[Manifest, InputSpec]:
    file = folder / CASCADE
    if not file.is_file() or file.stat().st_size > MAX_BYTES:
        raise ArtifactError(f"{folder} is no cascade: it has no {CASCADE}")
    try:
        manifest = Manifest.model_validate_json(file.read_bytes())
        return manifest, InputSpec.from_json(manifest.spec)
    except (ValidationError, ValueError, KeyError, TypeError) as e:
        raise ArtifactError(f"{file} is damaged: {(str(e).splitlines() or ['?'])[0]}") from e


def dump(spec: InputSpec, labels: Sequence[str] | None, gate: Gate, members: Sequence[Member], figures: Any) -> str:
    """The text of `cascade.json`."""
    manifest = Manifest(
        spec=spec.to_json(), labels=list(labels) if labels is not None else None, **asdict(gate),
        members=(members[0], members[1]), figures=figures,
    )  # fmt: skip
    return json.dumps(manifest.model_dump(), indent=1) + "\n"
