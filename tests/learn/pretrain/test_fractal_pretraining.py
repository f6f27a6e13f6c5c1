"""Pre-training on fractals: exact loss and counts, pictures with several of them, and it learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import trimtab as tt
from trimtab import testing
from trimtab.core.errors import DataError
from trimtab.learn import FractalPretraining, methods
from trimtab.learn.pretrain.fractal_pretraining import set_bce

SPEC = "fractals:classes=4,n=64,size=16,points=500"


def net(classes: int = 4) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.Conv2d(16, 16, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(144, classes)
        )


def test_the_weight_of_positives_is_classes_over_distinct_labels():
    target = torch.zeros(2, 1000)
    target[0, [3, 8]] = 1
    target[1, 5] = 1
    logits = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0))
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    each[0, [3, 8]] *= 500
    each[1, 5] *= 1000
    assert torch.allclose(set_bce(logits, target), each.mean())
    assert torch.isfinite(set_bce(logits, torch.zeros(2, 1000)))


def test_the_backbone_of_the_paper_has_its_parameters():
    with torch.device("meta"):
        model = tt.create_model("resnet50", num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == 25_557_032


def test_the_battery_holds_on_fractals(monkeypatch):
    monkeypatch.setattr(testing, "_digits", lambda: tt.load_data(SPEC))
    testing.check_objective(FractalPretraining, model=net, slow=False, lr=0.1)


def test_it_trains_on_sets_and_leaves_a_classifier_of_systems():
    data = tt.load_data(SPEC)
    seen = []

    class Watched(FractalPretraining):
        def losses(self, model, batch, ctx):
            seen.append(batch["label"])
            return super().losses(model, batch, ctx)

    result = tt.fit(net(), data, Watched(objects=3), epochs=2, batch_size=32, progress=False, device="cpu")
    assert all(labels.shape == (32, 4) and 1 <= labels.sum(1).min() <= labels.sum(1).max() <= 3 for labels in seen)
    assert result.best is None  # nothing was validated
    assert tt.evaluate(result.model, data, "test")["n"] == 20


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda: FractalPretraining(objects=0), ValueError, "objects must be a whole number of at least 1, got 0"),
        (lambda: FractalPretraining(smallest=0.7), ValueError, "smallest <= largest <= 1, got 0.7 and 0.6"),
        (lambda: tt.fit(net(), tt.load_data("shapes:n=60"), FractalPretraining()), DataError, "needs data made by"),
        (lambda: tt.fit(net(7), tt.load_data(SPEC), FractalPretraining()), ValueError, "must have 4 classes, one per"),
    ],
)
def test_what_cannot_work_is_refused(act, error, message):
    with pytest.raises(error, match=message):
        act()


def test_from_the_command_line_to_other_classes(tmp_path, monkeypatch):
    from trimtab import cli

    monkeypatch.chdir(tmp_path)
    model = ["--model", "resnet8_mlperf_tiny", "--quiet", "--epochs", "1"]
    assert (
        cli.main(["train", SPEC, "--objective", "fractal_pretraining", "--set", "objects=2", "--out", "pre", *model])
        == 0
    )
    assert cli.main(["train", "shapes:classes=3,size=16,n=60", "--weights", "pre", "--out", "tuned", *model]) == 0
    assert tt.load("tuned")(torch.zeros(1, 3, 16, 16)).shape == (1, 3)


def test_from_a_recipe(tmp_path):
    from trimtab.compact.recipe import run

    file = tmp_path / "recipe.yaml"
    file.write_text(f"""
data: {{spec: "{SPEC}"}}
model: {{name: resnet8_mlperf_tiny}}
out: {tmp_path / "pre"}
phases:
  - train: {{objective: fractal_pretraining, epochs: 1, progress: false}}
""")
    assert run(file)["phases"][0]["phase"] == "train"
    assert methods.parameters("fractal_pretraining") == {"objects": 5, "smallest": 0.15, "largest": 0.6}
