"""Packed codes come back as they were, in as many bytes as the fact sheets say."""

from __future__ import annotations

import pytest
import torch

from trimtab.compress.quantize.packing import PackedWeight, pack, packed_bytes, unpack


@pytest.mark.parametrize("packing", [1, 2, 3, 4, 5, 6, 7, 8, "base-3"])
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (4, 3, 3, 3), (64, 9)])
def test_unpacking_gives_the_codes_back(packing, shape):
    levels = 3 if packing == "base-3" else 2**packing
    codes = torch.randint(levels, shape, generator=torch.Generator().manual_seed(0))
    stored = pack(codes, packing)
    assert stored.dtype == torch.uint8 and len(stored) == packed_bytes(codes.numel(), packing)
    assert torch.equal(unpack(stored, packing, shape), codes)


def test_bytes_of_a_512x512_layer():
    assert packed_bytes(512 * 512, 2) == 65_536
    assert packed_bytes(512 * 512, "base-3") == 52_429
    assert PackedWeight((512, 512), "base-3").stored_bytes() == 52_429


def test_two_bit_codes_are_little_endian_four_to_a_byte():
    assert pack(torch.tensor([3, 0, 1, 2]), 2).tolist() == [3 + 0 * 4 + 1 * 16 + 2 * 64]


def test_five_trits_reach_242():
    assert pack(torch.tensor([2] * 5), "base-3").tolist() == [242]


def test_three_bit_codes_run_across_bytes():
    assert pack(torch.tensor([0b101, 0b011, 0b110]), 3).tolist() == [0b10_011_101, 0b1]


@pytest.mark.parametrize("packing", [2, "base-3"])
def test_codes_that_do_not_fit_are_refused(packing):
    with pytest.raises(ValueError, match="codes must be 0 to"):
        pack(torch.tensor([0, 4]), packing)
    with pytest.raises(ValueError, match="codes must be 0 to"):
        pack(torch.tensor([-1, 0]), packing)


@pytest.mark.parametrize("packing", [0, 9, "trits"])
def test_unknown_packings_are_refused(packing):
    with pytest.raises(ValueError, match="packing must be 1 to 8 bits or 'base-3'"):
        packed_bytes(8, packing)
