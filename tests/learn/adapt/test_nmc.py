"""Nearest mean classifier: exact in any order and any parts, a linear layer in the end."""

from __future__ import annotations

import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import trimtab as tt
from trimtab.learn.adapt import FeatureExtractor, NearestMeanClassifier, class_incremental, domain_incremental, nmc
from trimtab.learn.adapt.nmc import CIFAR100_ORDER


@pytest.fixture(scope="module")
def digits():
    return tt.load_data("digits")


class Pixels(nn.Module):
    """The pixels are the features."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(x.flatten(1))


@pytest.fixture(scope="module")
def features(digits):
    return FeatureExtractor(Pixels()).of(digits, "train")


@pytest.mark.parametrize("parts", [1, 3, 10])
def test_any_order_and_any_parts_give_the_same_means(features, parts):
    x, y = features
    once = NearestMeanClassifier(10, 64).partial_fit(x, y)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(parts))
    many = NearestMeanClassifier(10, 64)
    for rows in order.chunk(parts):
        many.partial_fit(x[rows], y[rows])
    assert (many.means() - once.means()).abs().max() < 1e-12
    assert torch.equal(many.predict(x), once.predict(x))


def test_merged_parts_are_the_whole(features):
    x, y = features
    a, b = (NearestMeanClassifier(10, 64).partial_fit(x[s], y[s]) for s in (slice(None, 400), slice(400, None)))
    whole = NearestMeanClassifier(10, 64).partial_fit(x, y)
    both = a.merge(b)
    assert torch.equal(both.statistics.count, whole.statistics.count)
    assert (both.statistics.sum - whole.statistics.sum).abs().max() < 1e-12
    with pytest.raises(ValueError, match="the same normalize and metric"):
        a.merge(NearestMeanClassifier(10, 64, metric="cosine"))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_the_linear_layer_is_the_distance_rule(features, normalize, metric):
    x, y = features
    nearest = NearestMeanClassifier(10, 64, normalize=normalize, metric=metric).partial_fit(x, y)
    weight, bias = nearest.as_linear()
    z = F.normalize(x, dim=1) if normalize else x
    linear = (z.double() @ weight.double().T + bias).argmax(1)
    assert torch.equal(linear, nearest.predict(x))
    if metric == "euclidean":
        torch.testing.assert_close(bias, -0.5 * weight.square().sum(1))


def test_means_of_unit_vectors_are_shorter_than_one(features):
    nearest = NearestMeanClassifier(10, 64).partial_fit(*features)
    lengths = nearest.means().norm(dim=1)
    assert (lengths < 1).all() and lengths.std() > 1e-3
    cosine = NearestMeanClassifier(10, 64, metric="cosine").partial_fit(*features)
    torch.testing.assert_close(cosine.means().norm(dim=1), torch.ones(10).double())


def test_a_class_is_unlearned_exactly(features):
    x, y = features
    nearest = NearestMeanClassifier(10, 64).partial_fit(x, y)
    nearest.forget(3)
    never = NearestMeanClassifier(10, 64).partial_fit(x[y != 3], y[y != 3])
    torch.testing.assert_close(nearest.means(), never.means(), atol=1e-12, rtol=0)
    assert 3 not in nearest.predict(x) and torch.equal(nearest.predict(x), never.predict(x))


def test_the_state_is_as_small_as_the_paper_s():
    state = NearestMeanClassifier(100, 768).statistics.state_dict()
    assert sum(v.numel() for v in state.values()) == 100 * (768 + 1) == 76_900


def test_the_order_of_split_cifar100_is_the_open_code_s():
    assert CIFAR100_ORDER[:10] == (87, 0, 52, 58, 44, 91, 68, 97, 51, 15)
    assert sorted(CIFAR100_ORDER) == list(range(100))


def test_a_stream_ends_where_one_look_at_all_data_does(digits):
    stream = class_incremental(digits, tasks=5, seed=2)
    result = nmc(Pixels(), stream)
    once = NearestMeanClassifier(10, 64).partial_fit(*FeatureExtractor(Pixels()).of(digits, "train"))
    test = FeatureExtractor(Pixels()).of(digits, "test")
    right = float((once.predict(test.values) == test.labels).double().mean())
    assert result.last_accuracy == pytest.approx(right) and right > 0.85
    assert tt.evaluate(result.model, digits)["accuracy"] == pytest.approx(right)
    assert result.incremental_accuracy > result.last_accuracy  # why the two must not be confused
    assert [row.count(None) for row in result.accuracy] == [4, 3, 2, 1, 0]
    other = nmc(Pixels(), class_incremental(digits, tasks=10, seed=5))
    torch.testing.assert_close(other.model.fc.weight, result.model.fc.weight)


def test_domains_add_up_over_sessions(digits):
    result = nmc(Pixels(), domain_incremental(digits, tasks=3))
    assert result.learned == [1, 2, 3] and result.accuracy[0][2] < result.accuracy[2][2]
    assert result.forward_transfer is not None and result.before is not None


def test_nmc_goes_on_after_a_kill(digits, tmp_path, monkeypatch):
    stream = class_incremental(digits, tasks=5)
    whole = nmc(Pixels(), stream)
    seen = []

    def of(self, data, split, original=FeatureExtractor.of):
        if len(seen) == 5:  # in the third task
            raise RuntimeError("killed")
        seen.append(split)
        return original(self, data, split)

    with monkeypatch.context() as m:
        m.setattr(FeatureExtractor, "of", of)
        with pytest.raises(RuntimeError, match="killed"):
            nmc(Pixels(), stream, out=tmp_path)
    assert nmc(Pixels(), stream, out=tmp_path).accuracy == whole.accuracy


@pytest.mark.parametrize("name", ["trim_1k", "resnetv2_50x1_bit"])  # a linear classifier, and a 1x1 convolution
def test_what_comes_out_is_plain_and_can_be_kept_exported_and_trained_on(digits, tmp_path, name):
    channels = {"channels": (128, 128, 128, 128)} if name != "trim_1k" else {}
    data = digits.subset({"train": 60, "test": 40})
    net = tt.create_model(name, num_classes=10, in_chans=1, img_size=8, seed=0, **channels)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    model = nmc(net, class_incremental(data, tasks=2)).model
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    x = next(iter(data.loader("test", batch_size=4)))["image"]
    tt.save(model, tmp_path / "kept", spec=data.spec)
    torch.testing.assert_close(tt.load(tmp_path / "kept")(x), model(x))
    if name == "trim_1k":
        tt.export(model, tmp_path / "m.onnx", data=data)
        session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
        got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), atol=1e-4, rtol=1e-3)
        tt.fit(model, data, epochs=1, progress=False)


def test_one_image_of_a_class_is_enough_for_a_mean(digits):
    train = digits.splits["train"]
    rows = torch.stack([(train.labels == c).nonzero()[0, 0] for c in range(10)])
    few = digits.like(splits={**digits.splits, "train": train.take(rows)})
    assert nmc(Pixels(), class_incremental(few, tasks=5)).last_accuracy > 0.4
    with pytest.raises(ValueError, match="metric must be euclidean or cosine, got 'manhattan'"):
        nmc(Pixels(), class_incremental(few, tasks=5), metric="manhattan")
    with pytest.raises(ValueError, match="no class was seen yet"):
        NearestMeanClassifier(2, 2).predict(torch.zeros(1, 2))
