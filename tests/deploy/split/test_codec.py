"""Whole numbers survive the way to bytes and back, for as many bytes as the tables say."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.core.errors import ArtifactError
from trimtab.deploy.split.bottleneck import Prior
from trimtab.deploy.split.codec import LONGEST, TOTAL, Codec, CodecError, checksum


@pytest.fixture(scope="module")
def prior() -> Prior:
    torch.manual_seed(0)
    return Prior(24)


def test_untrained_tables_cover_ten_on_both_sides_and_one_symbol_for_all_else(prior: Prior) -> None:
    codec = Codec.of(prior)
    assert codec.low == (-10,) * 24 and {len(c) for c in codec.counts} == {21 + 1}
    assert {sum(c) for c in codec.counts} == {TOTAL} and min(min(c) for c in codec.counts) >= 1


def test_settled_quantiles_are_where_the_auxiliary_loss_is_zero(prior: Prior) -> None:
    settled = Prior(24)
    settled.load_state_dict(prior.state_dict())
    before = float(settled.auxiliary_loss().detach())
    settled.settle()
    assert before > 100 and float(settled.auxiliary_loss().detach()) < 1e-2
    rounded = settled.logits(settled.quantiles.detach()).sigmoid()
    assert torch.allclose(rounded[:, 1], torch.tensor(0.5), atol=1e-4)


@pytest.mark.parametrize("settle", [False, True])
def test_bytes_are_the_estimated_bits(prior: Prior, settle: bool) -> None:
    twin = Prior(24).eval()
    twin.load_state_dict(prior.state_dict())
    if settle:
        twin.settle()
    codec = Codec.of(twin)
    symbols = torch.round(6 * torch.randn(24, 55, 55, generator=torch.Generator().manual_seed(1))).clamp(-10, 10)
    payload = codec.encode(symbols.numpy())
    estimate = float(twin.bits(symbols[None] + twin.medians).detach())
    assert len(payload) > 1000
    assert abs(8 * len(payload) - codec.bits(symbols.numpy())) < 64 + 1e-4 * estimate
    if settle:  # the tables say what the prior says
        assert abs(8 * len(payload) - estimate) < 64 + 0.01 * estimate


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-(2**30), 2**30), min_size=12, max_size=12), st.integers(1, 3))
def test_any_numbers_come_back(values: list[int], width: int) -> None:
    torch.manual_seed(0)
    codec = Codec.of(Prior(2))
    symbols = np.array(values, np.int32)[: 4 * width].reshape(2, 2, width)
    assert (codec.decode(codec.encode(symbols), (2, width)) == symbols).all()


def test_what_is_no_number_is_sent_as_one(prior: Prior) -> None:
    codec = Codec.of(Prior(1))
    symbols = np.array([[[np.nan, np.inf, -np.inf, 3.0]]])
    assert codec.decode(codec.encode(symbols), (1, 4)).tolist() == [[[0, 2**30, -(2**30), 3]]]


def test_tables_are_kept_to_the_bit_and_their_hash_is_their_name(prior: Prior) -> None:
    codec = Codec.of(prior)
    assert Codec.read(codec.raw) == codec and Codec.read(codec.raw).id == codec.id and len(codec.id) == 64
    torch.manual_seed(1)
    assert Codec.of(Prior(24)).id != codec.id


@pytest.mark.parametrize("damage", [b"", b"\xc1", b"\x80", "low", "counts", "medians"])
def test_damaged_tables_are_refused(prior: Prior, damage: bytes | str) -> None:
    msgpack = pytest.importorskip("msgpack")
    kept = msgpack.unpackb(Codec.of(prior).raw)
    wrong = {"low": [0.5] * 24, "counts": [[1, 1]] * 24, "medians": [float("nan")] * 24}
    raw = damage if isinstance(damage, bytes) else msgpack.packb(kept | {damage: wrong[damage]})
    with pytest.raises(ArtifactError, match="codec is damaged"):
        Codec.read(raw)


def test_random_bytes_decode_to_something_or_are_refused(prior: Prior) -> None:
    codec, rng = Codec.of(prior), np.random.default_rng(0)
    for n in range(0, 200, 4):
        with suppress(CodecError):
            assert codec.decode(rng.bytes(n), (5, 5)).shape == (24, 5, 5)
    with pytest.raises(CodecError, match="multiple of 4"):
        codec.decode(b"abc", (5, 5))


def test_the_checksum_sees_what_the_coder_does_not(prior: Prior) -> None:
    codec = Codec.of(prior)
    symbols = np.random.default_rng(0).integers(-5, 6, (24, 9, 9))
    payload = codec.encode(symbols)
    hurt = bytearray(payload)
    hurt[40] ^= 1
    try:
        wrong = float((codec.decode(bytes(hurt), (9, 9)) != symbols).mean())
        assert wrong > 0.5  # silently
    except CodecError:
        pass
    kept = checksum(payload)
    for place in range(len(payload)):
        hurt = bytearray(payload)
        hurt[place] ^= 4
        assert checksum(hurt) != kept


@pytest.mark.parametrize("places", [1, 2, 50])
def test_no_payload_is_longer_than_a_server_reads(places: int) -> None:
    codec = Codec.of(Prior(1))
    assert len(codec.encode(np.full((1, 1, places), -(2**30)))) <= LONGEST * (places + 1)
