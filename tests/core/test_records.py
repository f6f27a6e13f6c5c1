"""The table of records on disk: exact bytes, crash-safe, resumable, in shards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from trimtab.core.errors import ArtifactError
from trimtab.core.records import Records

KIND = np.dtype([("seed", "<i4"), ("values", "<f2", (3,))])
WRITE_FOREVER = """
import sys, time
from pathlib import Path
from trimtab.core import records
records._EVERY = 0.0
table = records.Records(Path(sys.argv[1]), records.np.dtype([("seed", "<i4"), ("values", "<f2", (3,))]), 10**9)
with table.append(0) as out:
    print("writing", flush=True)
    while True:
        out.write(records.np.array([(out.done, (0.5, 0.25, 0.125))], table.dtype))
"""


def rows(start: int, stop: int) -> np.ndarray:
    return np.array([(i, (i % 7, 0.5, 0.25)) for i in range(start, stop)], KIND)


def fill(table: Records, step: int = 4, stop_at: int | None = None) -> None:
    for shard in range(table.shards):
        start, stop = table.bounds(shard)
        with table.append(shard) as out:
            while start + out.done < stop:
                at = start + out.done
                if stop_at is not None and at >= stop_at:
                    raise KeyboardInterrupt
                out.write(rows(at, min(at + step, stop)))


def test_bytes_are_those_of_the_records_and_nothing_else(tmp_path):
    table = Records(tmp_path, KIND, 21)
    fill(table)
    assert table.nbytes == 21 * 10 == table.file(0).stat().st_size
    assert table.file(0).read_bytes() == rows(0, 21).tobytes()
    assert len(list(tmp_path.iterdir())) == 2  # the shard and its note


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_are_one_table(tmp_path, shards):
    table = Records(tmp_path, KIND, 23, shards=shards, unit=2)
    assert all(table.bounds(s)[0] % 2 == 0 for s in range(shards))
    assert not table.complete
    fill(table)
    assert table.complete
    wanted = np.array([22, 0, 7, 7, 13])
    assert (table.read(wanted) == rows(0, 23)[wanted]).all()
    table.verify()


def test_interrupted_anywhere_it_ends_with_the_same_bytes(tmp_path):
    table = Records(tmp_path, KIND, 23)
    with pytest.raises(KeyboardInterrupt):
        fill(table, stop_at=8)
    assert table.done(0) == 8 and not table.complete
    with open(table.file(0), "ab") as f:
        f.write(b"half a rec")  # written, but never noted
    fill(Records(tmp_path, KIND, 23))
    assert table.file(0).read_bytes() == rows(0, 23).tobytes()
    table.verify()


def test_a_killed_writer_leaves_whole_records(tmp_path):
    writer = subprocess.Popen([sys.executable, "-c", WRITE_FOREVER, str(tmp_path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None and writer.stdout.readline()
    table = Records(tmp_path, KIND, 10**9)
    for _ in range(200):
        time.sleep(0.02)
        if table.done(0) >= 3:
            break
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    done = table.done(0)
    assert done >= 3
    with table.append(0) as out:
        assert out.done == done
    kept = np.fromfile(table.file(0), KIND)
    assert len(kept) == done and (kept["seed"] == np.arange(done)).all()


def test_a_lost_file_is_made_again(tmp_path):
    table = Records(tmp_path, KIND, 9)
    fill(table)
    os.truncate(table.file(0), 20)
    assert table.done(0) == 0 and not table.complete
    fill(table)
    assert table.file(0).read_bytes() == rows(0, 9).tobytes()


def test_damage_is_found(tmp_path):
    table = Records(tmp_path, KIND, 9)
    fill(table)
    raw = bytearray(table.file(0).read_bytes())
    raw[33] ^= 1
    table.file(0).write_bytes(raw)
    with pytest.raises(ArtifactError, match=r"is damaged \(wrong checksum\); delete it"):
        Records(tmp_path, KIND, 9).verify()


def test_an_unfinished_table_is_not_read(tmp_path):
    table = Records(tmp_path, KIND, 9)
    with pytest.raises(KeyboardInterrupt):
        fill(table, stop_at=4)
    with pytest.raises(ArtifactError, match="has 4 of 9 records; finish making it"):
        table.read(np.array([0]))
    note = table.file(0).with_suffix(".json")
    note.write_text("{}")
    with pytest.raises(ArtifactError, match="cannot be read"):
        table.done(0)


def test_shards_are_checked(tmp_path):
    with pytest.raises(ValueError, match="shards must be 1 to 4 for 9 records, got 5"):
        Records(tmp_path, KIND, 9, shards=5, unit=2)
