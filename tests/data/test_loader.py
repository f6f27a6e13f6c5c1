from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import pytest
import torch

from trimtab.data import Data, load_data, normalise, preprocess


@pytest.fixture(scope="module")
def data() -> Data:
    return load_data("shapes:classes=4,size=16,n=300")


def batches(data: Data, **options) -> list[dict[str, torch.Tensor]]:
    return list(data.loader("train", **{"batch_size": 32, "augment": "crop_flip+randaugment", **options}))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_batch_has_the_documented_form(data: Data):
    batch = batches(data)[0]
    assert {k: (tuple(v.shape), v.dtype) for k, v in batch.items()} == {
        "image": ((32, 3, 16, 16), torch.float32), "label": ((32,), torch.int64), "index": ((32,), torch.int64),
    }  # fmt: skip
    assert torch.equal(batch["label"], data.splits["train"].labels[batch["index"]])


def test_normalised_pixels_are_those_of_preprocess(data: Data):
    """What `predict` feeds a model is what evaluation fed it."""
    batch = next(iter(data.loader("test", batch_size=8)))
    for i in range(8):
        ours = preprocess(data.splits["test"].image(i), data.spec)
        assert torch.equal(batch["image"][i], torch.from_numpy(ours))


def test_the_train_split_is_normalised_to_mean_0_and_deviation_1(data: Data):
    x = torch.cat([b["image"] for b in batches(data, augment=None, drop_last=False)])
    assert x.mean((0, 2, 3)).abs().max() < 1e-4
    assert (x.std((0, 2, 3)) - 1).abs().max() < 1e-3


@pytest.mark.parametrize("augment", [None, "auto", "crop_flip", "rrc+flip", "trivial+cutout"])
def test_batches_depend_on_seed_epoch_and_index_only(data: Data, augment: str | None):
    torch.manual_seed(1)
    first = batches(data, augment=augment, seed=3, epoch=2)
    torch.manual_seed(2)
    again = data.loader("train", batch_size=32, augment=augment, seed=3, epoch=2)
    assert all(equal(a, again.batch(k)) for k, a in reversed(list(enumerate(first))))  # in any order
    for other in ({"seed": 4, "epoch": 2}, {"seed": 3, "epoch": 3}):
        assert not torch.equal(first[0]["index"], batches(data, augment=augment, **other)[0]["index"])


@pytest.mark.parametrize("skip", [0, 1, 4, 6, 9])
def test_resume_is_bit_exact(data: Data, skip: int):
    whole = batches(data)
    loader = data.loader("train", batch_size=32, augment="crop_flip+randaugment", skip=skip)
    rest = list(loader)
    assert len(loader) == len(rest) == max(0, len(whole) - skip)
    assert all(equal(a, b) for a, b in zip(whole[skip:], rest, strict=True))


def test_another_process_makes_the_same_batches(data: Data):
    code = (
        "import hashlib, trimtab as tt; d = tt.load_data('shapes:classes=4,size=16,n=300');"
        "b = d.loader('train', batch_size=32, augment='crop_flip+cutout', seed=5, epoch=1).batch(3);"
        "print(hashlib.md5(b['image'].numpy().tobytes() + b['index'].numpy().tobytes()).hexdigest())"
    )
    env = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    b = data.loader("train", batch_size=32, augment="crop_flip+cutout", seed=5, epoch=1).batch(3)
    here = hashlib.md5(b["image"].numpy().tobytes() + b["index"].numpy().tobytes()).hexdigest()
    assert there == here + "\n"


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("augment", [None, "crop_flip+randaugment+cutout", "custom"])
def test_the_ranks_slices_are_the_batch_of_one_process(data: Data, world: int, augment: str | None):
    if augment == "custom":

        def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            return images[torch.randperm(len(images), generator=generator)]  # mixes samples

    options = {"augment": augment, "drop_last": False}
    whole = batches(data, **options)
    parts = [batches(data, rank=r, world=world, **options) for r in range(world)]
    assert {len(p) for p in parts} == {len(whole)}
    for k, batch in enumerate(whole):
        for name in batch:
            joined = torch.cat([p[k][name] for p in parts])
            torch.testing.assert_close(joined, batch[name], atol=1e-5, rtol=0)
    assert {len(p[0]["label"]) for p in parts} == {32 // world}


def test_an_epoch_visits_every_image_once(data: Data):
    n = len(data.splits["train"])
    index = torch.cat([b["index"] for b in batches(data, drop_last=False)])
    assert index.sort().values.tolist() == list(range(n))
    assert index.tolist() != list(range(n))
    inorder = torch.cat([b["index"] for b in data.loader("val", batch_size=7)])
    assert inorder.tolist() == list(range(len(data.splits["val"])))


def test_drop_last(data: Data):
    n = len(data.splits["train"])
    assert n % 32
    assert len(data.loader("train", batch_size=32)) == n // 32
    assert len(data.loader("train", batch_size=32, drop_last=False)) == n // 32 + 1
    assert len(data.loader("train", batch_size=n + 1)) == 1  # rather one small batch than none
    assert len(data.loader("test", batch_size=32)) == -(-len(data.splits["test"]) // 32)


@pytest.mark.parametrize("augment", [None, "trivial", "rrc"])
def test_raw_batches_are_uint8(data: Data, augment: str | None):
    image = batches(data, raw=True, augment=augment)[0]["image"]
    assert image.dtype == torch.uint8


def test_a_users_own_augmentation(data: Data):
    def darker(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        assert images.dtype == torch.uint8
        return images // (2 + torch.randint(3, (len(images), 1, 1, 1), generator=generator)).to(torch.uint8)

    plain, dark = (batches(data, augment=a, raw=True)[0]["image"].float() for a in (None, darker))
    assert dark.mean() < 0.5 * plain.mean()
    with pytest.raises(ValueError, match="augment must return 32 images"):
        batches(data, augment=lambda images, generator: images[:3])


def test_auto_mirrors_neither_digits_nor_grey():
    assert load_data("digits").auto_augment() == "crop"
    assert load_data("shapes:n=40,channels=1").auto_augment() == "crop"
    assert load_data("shapes:n=40").auto_augment() == "crop_flip"
    assert load_data("shapes:n=40,size=96").auto_augment() == "rrc=0.35+flip"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 9, "world": 2}, r"multiple of world \(2\), got 9"),
        ({"rank": 2, "world": 2}, "rank must be 0 to world - 1"),
        ({"skip": -1}, "skip must be at least 0"),
        ({"augment": 3}, "augment must be words, a function or None"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_wrong_arguments_are_explained(data: Data, options: dict, words: str):
    with pytest.raises(ValueError, match=words):
        data.loader("train", **options)


def test_an_unknown_split_is_explained(data: Data):
    with pytest.raises(ValueError, match="split must be one of train, val, test, got 'dev'"):
        data.loader("dev")


def test_normalise_leaves_its_input_alone():
    x = torch.rand(2, 3, 4, 4) * 255
    before = x.clone()
    out = normalise(x, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert torch.equal(x, before)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    torch.testing.assert_close(out, (x / 255 - mean) / std)
