"""Energy of one inference: an estimate from a published table, and the real thing where the machine can tell.

The table is Horowitz, "Computing's energy problem", ISSCC 2014, 45 nm at 0.9 V, as commonly cited (also in Han et al.,
EIE, 2016). It is a yardstick for comparing models with one another, not a prediction for any one chip: newer processes
need several times less, and instruction overhead, leakage and idle time are left out.

| operation          | pJ   |   | access                  | pJ per byte |
|--------------------|------|---|-------------------------|-------------|
| int8 add           | 0.03 |   | SRAM, 32 KB (5 pJ / 4B) | 1.25        |
| int32 add          | 0.1  |   | DRAM (640 pJ / 4B)      | 160         |
| int8 multiply      | 0.2  |   |                         |             |
| int32 multiply     | 3.1  |   |                         |             |
| float16 add        | 0.4  |   |                         |             |
| float16 multiply   | 1.1  |   |                         |             |
| float32 add        | 0.9  |   |                         |             |
| float32 multiply   | 3.7  |   |                         |             |
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

OP_PJ = {
    ("int8", "add"): 0.03,
    ("int32", "add"): 0.1,
    ("int8", "mul"): 0.2,
    ("int32", "mul"): 3.1,
    ("float16", "add"): 0.4,
    ("float16", "mul"): 1.1,
    ("float32", "add"): 0.9,
    ("float32", "mul"): 3.7,
}
BYTE_PJ = {"sram": 1.25, "dram": 160.0}

POWERCAP = Path("/sys/class/powercap")


def mac_pj(weight_bits: float, act_bits: float) -> float:
    """Picojoules of one multiply-accumulate.

    Activations wider than 8 bits are floating point, whatever the weights are stored in (they are expanded before the
    product). Otherwise the product is an integer one accumulated in int32; its cost grows with the product of the
    widths, which is what the table says between 8 and 32 bits (0.2 pJ to 3.1 pJ, about 16 times).

    Example:
        >>> [round(mac_pj(bits, bits), 3) for bits in (32, 16, 8)]
        [4.6, 1.5, 0.3]
    """
    if act_bits > 16:
        return OP_PJ["float32", "mul"] + OP_PJ["float32", "add"]
    if act_bits > 8:
        return OP_PJ["float16", "mul"] + OP_PJ["float16", "add"]
    return OP_PJ["int8", "mul"] * (min(weight_bits, 8) * act_bits) / 64 + OP_PJ["int32", "add"]


def estimate(macs_pj: float, weight_bytes: float, act_bytes: float) -> float:
    """Joules of one inference: arithmetic, plus every weight once from DRAM, plus activations moved through SRAM."""
    return 1e-12 * (macs_pj + weight_bytes * BYTE_PJ["dram"] + act_bytes * BYTE_PJ["sram"])


def _counters() -> list[tuple[Path, int]]:
    """(energy_uj, wrap) of every readable RAPL package domain; sub-domains are part of their package."""
    found = []
    for zone in sorted(POWERCAP.glob("intel-rapl:*")) if POWERCAP.is_dir() else []:
        if zone.name.count(":") != 1:
            continue
        try:
            int((zone / "energy_uj").read_text())
            found.append((zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())))
        except (OSError, ValueError):
            continue
    return found


def rapl_available() -> bool:
    """Whether this machine offers energy counters that we may read (Intel and AMD, usually root only)."""
    return bool(_counters())


def rapl_joules(call: Callable[[], object], *, seconds: float = 1.0) -> float | None:
    """Joules per call of the whole processor package, idle power included; None without readable RAPL counters."""
    counters = _counters()
    if not counters:
        return None
    call()
    before = [int(path.read_text()) for path, _ in counters]
    start, n = time.perf_counter(), 0
    while n == 0 or time.perf_counter() - start < seconds:
        call()
        n += 1
    used = 0
    for (path, wrap), old in zip(counters, before, strict=True):
        used += (int(path.read_text()) - old) % (wrap + 1)
    return used * 1e-6 / n
