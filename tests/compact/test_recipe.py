import pytest

import trimtab as tt
from trimtab.compact.recipe import RecipeError, read, run

GOOD = """
data: digits
model: {{name: trim_10k}}
out: {out}
phases:
  - train: {{epochs: 5, lr: 0.1, batch_size: 32, progress: false}}
    as: big
  - compress: {{method: magnitude, budget: "macs<=50%"}}
  - train: {{objective: {{kd: {{teacher: big}}}}, epochs: 3, lr: 0.05, batch_size: 32, progress: false}}
  - export: {{int8: true}}
budget: "size<=20KB, accuracy>=0.5"
"""


def test_a_recipe_runs_and_a_second_run_repeats_nothing(tmp_path, monkeypatch):
    file = tmp_path / "r.yaml"
    file.write_text(GOOD.format(out=tmp_path / "o"))
    result = run(file)
    assert [p["phase"] for p in result["phases"]] == ["train", "compress", "train", "export"]
    assert result["budget"]["met"]
    assert result["cost"]["size"] == (tmp_path / "o" / "model.onnx").stat().st_size
    small, big = tt.load(tmp_path / "o"), tt.load(tmp_path / "o" / "phases" / "1-big")
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in big.parameters())
    monkeypatch.setattr("trimtab.compact.recipe.fit", lambda *a, **k: pytest.fail("trained again"))
    again = run(file)
    assert again["accuracy"] == result["accuracy"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("phases:", "phase:"), "phases"),
        (("method: magnitude", "method: wish"), "phases.1: method must be one of"),
        (("method: magnitude", "nrm: 1"), "phases.1: magnitude has no option 'nrm'"),
        (("macs<=50%", "macs<50%"), "expected <= or >="),
        (("name: trim_10k", "nam: trim_10k"), "expected a 'name'"),
        (("kd: {{teacher: big}}", "kd: {{teacher: bigger}}"), "earlier phase"),
        (("kd: {{teacher: big}}", "magic: {{}}"), "objective must be one of"),
        (("  - export: {{int8: true}}", "  - explode: {{}}"), "explode"),
        (("  - export: {{int8: true}}", "  - {{}}"), "expected one of train, compress, search, adapt, curate, export"),
        (("size<=20KB", "size<20KB"), "expected <= or >="),
        (("data: digits", "data: [unclosed"), "not YAML"),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_runs(tmp_path, change, says):
    file = tmp_path / "r.yaml"
    file.write_text(GOOD.replace(*change).format(out=tmp_path / "o"))
    with pytest.raises(ValueError, match=says):
        run(file)
    assert not (tmp_path / "o").exists()


OBJECTIVES = """
data: {data}
model: {{name: trim_net, width: 4}}
out: {out}
phases:
  - train: {{objective: {{lsskd: {{teacher: deepest, branches: 2}}}}, epochs: 1, progress: false}}
    as: big
  - train: {{objective: bias_loss, epochs: 1, progress: false}}
  - train: {{objective: {{hsakd: {{teacher: big}}}}, epochs: 1, progress: false}}
"""


def test_objectives_by_name_and_words_as_their_teacher(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(OBJECTIVES.format(data="{spec: digits, limit: 256}", out=tmp_path / "o"))
    assert [p["phase"] for p in run(file)["phases"]] == ["train"] * 3
    for wrong, says in (
        (("teacher: deepest", "teacher: wise"), "teacher must be one of previous_epoch, deepest or None, got 'wise'"),
        (("branches: 2", "branch: 2"), "lsskd has no option 'branch'; it has teacher"),
        (("{{hsakd: {{teacher: big}}}}", "hsakd"), "hsakd needs teacher"),
        (("objective: bias_loss", "objective: {{bias_loss: {{alpha: -1}}}}"), "alpha must not be negative"),
    ):
        file.write_text(OBJECTIVES.replace(*wrong).format(data="digits", out=tmp_path / "p"))
        with pytest.raises(RecipeError, match=says):
            run(file)


def test_reading_runs_no_code(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text("model: !!python/object/apply:os.system ['true']\nphases: []\n")
    with pytest.raises(RecipeError, match="not YAML"):
        read(file)
