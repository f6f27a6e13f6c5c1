"""How many architectures can be pruned with no configuration at all: ours beside torch-pruning with its defaults.

    python -m benchmarks.prunability                       # all of them; goes on where it stopped
    python -m benchmarks.prunability --models vit_tiny_patch16_224,resnet18 --redo
    python -m benchmarks.prunability --suite torchvision   # or huggingface, timm (the default), all
    python -m benchmarks.prunability --table               # print what is known, run nothing

Each model is built with random weights at the smallest input it accepts and pruned to half of its MACs. It passes when
the result has the model's own class, costs at most half, runs, trains a step with finite gradients, is saved and loaded
by a fresh process to the same function, and exports to ONNX with the same outputs. torch-pruning is used as its
documentation says: group magnitude importance, the classifier ignored, pruned in small steps until half of the MACs are
gone; its result is saved as it recommends, the whole object pickled. Each model and tool runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "prunability.json"
TOOLS = ("ours", "torch-pruning")
SIZES = (64, 96, 128, 160, 192, 224, 240, 256, 288, 299, 331, 384)

TIMM = """
resnet18 resnet50 resnext50_32x4d seresnet50 resnest14d skresnet18 ecaresnet26t res2net50_14w_8s densenet121
rdnet_tiny mobilenetv2_100 mobilenetv3_small_050 mobilenetv4_conv_small efficientnet_b0 tf_efficientnetv2_b0
tinynet_e mixnet_s mnasnet_small fbnetc_100 hardcorenas_a ghostnet_050 regnetx_002 regnety_002 repvit_m0_9
repvgg_a0 mobileone_s0 fastvit_t8 starnet_s1 lcnet_035 rexnet_100 dla34 hrnet_w18_small ese_vovnet19b_dw
cspdarknet53 cs3darknet_s inception_v3 inception_v4 xception41 vgg11_bn selecsls42 dpn68 nf_resnet26
resnetv2_50x1_bit hgnetv2_b0 convnext_atto convnextv2_atto inception_next_atto mambaout_femto poolformer_s12
caformer_s18 focalnet_tiny_srf edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvit_b0
efficientvit_m0 levit_128 mobilevit_xxs mobilevitv2_050 nextvit_small shvit_s1 visformer_tiny
vit_tiny_patch16_224 deit3_small_patch16_224 eva02_tiny_patch14_224 cait_xxs24_224 xcit_nano_12_p16_224
crossvit_9_240 coat_lite_tiny coatnet_nano_rw_224 davit_tiny swin_tiny_patch4_window7_224
swinv2_tiny_window8_256 tiny_vit_5m_224 pvt_v2_b0 twins_svt_small mvitv2_tiny volo_d1_224 mixer_s32_224
gmlp_s16_224
""".split()  # noqa: SIM905

TORCHVISION = """
alexnet vgg11_bn resnet18 resnext50_32x4d squeezenet1_1 densenet121 googlenet inception_v3 mobilenet_v2
mobilenet_v3_small shufflenet_v2_x0_5 mnasnet0_5 efficientnet_b0 efficientnet_v2_s regnet_y_400mf
convnext_tiny vit_b_32 swin_t swin_v2_t maxvit_t
""".split()  # noqa: SIM905

HUGGINGFACE = """
vit deit beit swin swinv2 convnext convnextv2 resnet mobilenet_v1 mobilenet_v2 mobilevit mobilevitv2
efficientnet regnet bit poolformer pvt pvt_v2 levit segformer cvt focalnet dinov2 vit_msn
""".split()  # noqa: SIM905


# ---------------------------------------------------------------------------------------------------------------------
# models


def build(suite: str, name: str) -> tuple[Any, int]:
    """A model with random weights, and the side of the smallest input it accepts."""
    import torch

    torch.manual_seed(0)
    make = {"timm": _timm, "torchvision": _torchvision, "huggingface": _huggingface}[suite]
    error: Exception | None = None
    for size in SIZES:
        try:
            model = make(name, size).eval()
            with torch.no_grad():
                out = tensors(model(torch.randn(2, 3, size, size)))[0]
            if out.shape[0] == 2 and bool(torch.isfinite(out).all()):
                return model, size
        except Exception as e:
            error = e
    raise RuntimeError(f"no input size works: {error}")


def _timm(name: str, size: int) -> Any:
    import timm

    from trimtab.core.edit import remember_base

    options: list[dict[str, Any]] = [{"num_classes": 1000, "img_size": size}, {"num_classes": 1000}]
    for kwargs in options:
        try:
            model = timm.create_model(name, **kwargs)
        except (TypeError, AttributeError):
            continue
        remember_base(model, name, kwargs)
        return model
    raise RuntimeError(f"{name} cannot be built")


def _torchvision(name: str, size: int) -> Any:
    import torchvision

    kwargs: dict[str, Any] = {"weights": None}
    if name in ("googlenet", "inception_v3"):
        kwargs |= {"init_weights": False, "aux_logits": False}
    if name.startswith("vit"):
        kwargs["image_size"] = size
    if name == "maxvit_t":
        kwargs["input_size"] = (size, size)
    return torchvision.models.get_model(name, **kwargs)


def _huggingface(name: str, size: int) -> Any:
    """The architecture's default configuration, made small where the default is huge; images of `size`."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = name.replace("_", "-")
    make: Any = CONFIG_MAPPING[kind if kind in CONFIG_MAPPING else name]
    config = make(num_labels=1000)
    for key in ("image_size", "input_size"):
        if isinstance(getattr(config, key, None), int):
            setattr(config, key, size)
    if getattr(config, "num_hidden_layers", 0) in range(7, 100) and name not in ("resnet", "regnet"):
        config.num_hidden_layers = 4
    classes: Any = transformers.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    found = classes[type(config)]  # several for some, the plain classifier first
    return (found[0] if isinstance(found, list | tuple) else found)(config)


def tensors(out: Any) -> list[Any]:
    import torch

    return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]


# ---------------------------------------------------------------------------------------------------------------------
# one model, one tool


def try_one(suite: str, name: str, tool: str) -> dict[str, Any]:
    """Every step in order; stops at the first that fails and says why."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    row: dict[str, Any] = {"suite": suite, "model": name, "tool": tool, "ok": False, "step": "build"}
    start = time.perf_counter()
    try:
        model, size = build(suite, name)
        row |= {"input": size, "step": "prune"}
        before = cost(model, size)
        pruned = {"ours": prune_ours, "torch-pruning": prune_theirs}[tool](model, size)
        row |= {"seconds": round(time.perf_counter() - start, 1), "step": "class"}
        if type(pruned) is not type(model):
            raise RuntimeError(f"the result is a {type(pruned).__name__}")
        row["step"] = "run"
        with torch.no_grad():
            out = tensors(pruned.eval()(torch.randn(2, 3, size, size)))[0]
        if not bool(torch.isfinite(out).all()):
            raise RuntimeError("the output is not finite")
        row["step"] = "budget"
        after = cost(pruned, size)
        shares = [round(a / b, 4) for a, b in zip(after, before)]
        row |= {"macs": before[0], "kept_macs": shares[0], "kept_params": shares[1]}
        if after[0] > 0.5 * before[0]:
            raise RuntimeError(f"{100 * row['kept_macs']:.0f} % of the MACs are left")
        for step in (train, reload, export):
            row["step"] = step.__name__
            step(pruned, size, tool, suite, name)
        row |= {"ok": True, "step": "done"}
    except Exception as e:
        lines = [line for line in str(e).strip().splitlines() if line.strip()]
        row["why"] = f"{type(e).__name__}: {lines[0][:300] if lines else ''}"
        if row["step"] == "export":
            row["why"] += _unpruned_exports(suite, name, size)
    row["total_seconds"] = round(time.perf_counter() - start, 1)
    return row


def cost(model: Any, size: int) -> tuple[int, int]:
    from trimtab.core.cost import measure

    c = measure(model, (3, size, size), what=("macs", "params"))
    assert c.macs is not None and c.params is not None
    return c.macs, c.params


def prune_ours(model: Any, size: int) -> Any:
    from trimtab.compress import magnitude

    return magnitude(model, (3, size, size), budget="macs<=50%")


def prune_theirs(model: Any, size: int, steps: int = 12) -> Any:
    """It knows ratios of channels, not costs: 80 % of each layer in `steps` steps, until half of the MACs are gone."""
    import copy

    import torch
    import torch_pruning as tp

    model = copy.deepcopy(model)
    example = torch.randn(1, 3, size, size)
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    classes = tensors(model(example))[0].shape[-1]
    heads = [m for m in linear if getattr(m, "out_features", getattr(m, "out_channels", 0)) == classes][-2:]
    pruner = tp.pruner.MagnitudePruner(
        model, example, importance=tp.importance.GroupMagnitudeImportance(p=2), global_pruning=False,
        pruning_ratio=0.8, iterative_steps=steps, ignored_layers=heads,
    )  # fmt: skip
    half = 0.5 * cost(model, size)[0]
    for _ in range(steps):
        pruner.step()
        if cost(model, size)[0] <= half:
            break
    return model


def train(model: Any, size: int, tool: str, suite: str, name: str) -> None:
    import torch

    model.train()
    torch.manual_seed(1)
    logits = next(t for t in tensors(model(torch.randn(4, 3, size, size))) if t.dim() == 2)
    torch.nn.functional.cross_entropy(logits, torch.arange(4)).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    if not grads or not all(bool(torch.isfinite(g).all()) for g in grads):
        raise RuntimeError("gradients are not finite")
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=1e-4 / max(1.0, float(p.grad.abs().max())))
    model.zero_grad(set_to_none=True)
    model.eval()


def reload(model: Any, size: int, tool: str, suite: str, name: str) -> None:
    """Save, load in a fresh process, compare the outputs."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            torch.save([x, tensors(model(x))[0]], f"{folder}/io.pt")
        if tool == "ours":
            from trimtab.core.artifact import save

            save(model, Path(folder) / "model")
        else:
            torch.save(model, f"{folder}/model.pth")
        args = [sys.executable, "-m", "benchmarks.prunability", "--reload", folder, "--one", f"{suite}:{name}:{tool}",
                "--size", str(size)]  # fmt: skip
        done = subprocess.run(args, capture_output=True, text=True, timeout=200, cwd=Path(__file__).parents[1])
        if done.returncode:
            raise RuntimeError("load: " + (done.stderr.strip().splitlines() or ["failed"])[-1])


def reload_child(folder: str, suite: str, name: str, tool: str, size: int) -> None:
    import torch

    x, want = torch.load(f"{folder}/io.pt")
    if tool == "ours":
        from trimtab.core.artifact import load

        make = {"timm": None, "torchvision": _torchvision, "huggingface": _huggingface}[suite]
        model = load(Path(folder) / "model", base=make(name, size) if make else None)
    else:
        model = torch.load(f"{folder}/model.pth", weights_only=False)
    with torch.no_grad():
        got = tensors(model.eval()(x))[0]
    worst = float((got - want).abs().max() / want.abs().max().clamp_min(1e-9))
    if got.shape != want.shape or not worst < 1e-4:
        raise SystemExit(f"the loaded model computes something else ({worst:.1e})")


def export(model: Any, size: int, tool: str, suite: str, name: str) -> None:
    """To ONNX, and the outputs of ONNX Runtime are PyTorch's. Both tools' models go through the same exporter."""
    from torch import nn

    from trimtab.core.artifact import InputSpec
    from trimtab.deploy import export as to_onnx

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Any) -> Any:
            return tensors(self.model(x))[0]

    spec = InputSpec(size=(3, size, size), mean=(0.5,) * 3, std=(0.5,) * 3)
    with tempfile.TemporaryDirectory() as folder:
        try:
            to_onnx(Logits(), f"{folder}/model.onnx", spec=spec, exporter="classic")
        except Exception:
            to_onnx(Logits(), f"{folder}/model.onnx", spec=spec, exporter="auto")


def _unpruned_exports(suite: str, name: str, size: int) -> str:
    try:
        export(build(suite, name)[0], size, "", suite, name)
    except Exception:
        return " (the unpruned model does not export either)"
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# all of them


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--suite", default="timm", choices=("timm", "torchvision", "huggingface", "all"))
    parser.add_argument("--models", default="", help="names, separated by commas; default: all of the suite")
    parser.add_argument("--tool", default="both", choices=(*TOOLS, "both"))
    parser.add_argument("--limit", type=int, default=None, help="run at most so many (model, tool) pairs")
    parser.add_argument("--seconds", type=float, default=None, help="start no further pair after so many seconds")
    parser.add_argument("--timeout", type=float, default=400, help="seconds for one pair")
    parser.add_argument("--redo", action="store_true", help="also what is known already")
    parser.add_argument("--redo-failed", action="store_true", help="also what failed before")
    parser.add_argument("--redo-slow", action="store_true", help="also what was not done in time before")
    parser.add_argument("--table", action="store_true", help="print what is known and stop")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--reload", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        suite, name, tool = args.one.split(":")
        if args.reload:
            reload_child(args.reload, suite, name, tool, args.size)
        else:
            print("\n" + json.dumps(try_one(suite, name, tool)))
        return 0
    known = {(r["suite"], r["model"], r["tool"]): r for r in _read(args.out)}
    todo = [] if args.table else [
        (s, n, t) for s, n in _wanted(args) for t in TOOLS if args.tool in (t, "both")
        if args.redo or (s, n, t) not in known or (args.redo_failed and not known[s, n, t]["ok"])
        or (args.redo_slow and known[s, n, t]["step"] == "process")
    ]  # fmt: skip
    start = time.monotonic()
    for suite, name, tool in todo[: args.limit]:
        if args.seconds is not None and time.monotonic() - start > args.seconds:
            break
        row = _run(suite, name, tool, args.timeout)
        known[suite, name, tool] = row
        _write(args.out, known)
        print(f"{suite:11} {name:34} {tool:13} {_verdict(row)}", flush=True)
    _show(known)
    return 0


def _wanted(args: argparse.Namespace) -> list[tuple[str, str]]:
    suites = {"timm": TIMM, "torchvision": TORCHVISION, "huggingface": HUGGINGFACE}
    chosen = suites if args.suite == "all" else {args.suite: suites[args.suite]}
    if not args.models:
        return [(s, n) for s, names in chosen.items() for n in names]
    asked = args.models.split(",")
    found = [(s, n) for s, names in chosen.items() for n in names if n in asked]
    others = [n for n in asked if n not in {m for _, m in found}]
    if others and len(chosen) > 1:
        raise SystemExit(f"--models must be of the lists, or --suite say what they are; got {', '.join(others)}")
    return found + [(args.suite, n) for n in others]


def _run(suite: str, name: str, tool: str, timeout: float) -> dict[str, Any]:
    row: dict[str, Any] = {"suite": suite, "model": name, "tool": tool, "ok": False, "step": "process"}
    command = [sys.executable, "-m", "benchmarks.prunability", "--one", f"{suite}:{name}:{tool}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=Path(__file__).parents[1])
    except subprocess.TimeoutExpired:
        return row | {"why": f"not done after {timeout:.0f} s"}
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        return row | {"why": f"exit {done.returncode}: {(done.stderr.strip().splitlines() or [''])[-1][:200]}"}


def _read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def _write(path: Path, known: dict[Any, dict[str, Any]]) -> None:
    from trimtab.core import host
    from trimtab.core.files import write_text

    rows = [known[k] for k in sorted(known)]
    summary = {
        suite: {t: {"ok": sum(r["ok"] for r in _of(rows, suite, t)), "of": len(_of(rows, suite, t))} for t in TOOLS}
        for suite in sorted({r["suite"] for r in rows})
    }
    report = {"summary": summary, **host.provenance(Path(__file__).parent, "torch-pruning"), "rows": rows}
    write_text(path, json.dumps(report, indent=1) + "\n")


def _of(rows: list[dict[str, Any]], suite: str, tool: str) -> list[dict[str, Any]]:
    return [r for r in rows if r["suite"] == suite and r["tool"] == tool]


def _verdict(row: dict[str, Any]) -> str:
    if row["ok"]:
        return f"ok    {100 * row['kept_macs']:.1f} % of MACs, {100 * row['kept_params']:.0f} % of parameters"
    return f"FAILS at {row['step']}: {row.get('why', '')}"


def _show(known: dict[Any, dict[str, Any]]) -> None:
    rows = [known[k] for k in sorted(known)]
    names = sorted({(r["suite"], r["model"]) for r in rows})
    print(f"\n{'':46} {TOOLS[0]:6} {TOOLS[1]}")
    for suite, name in names:
        each = [known.get((suite, name, t)) for t in TOOLS]
        marks = ["-" if r is None else "ok" if r["ok"] else r["step"] for r in each]
        why = "; ".join(f"{t}: {r['why']}" for t, r in zip(TOOLS, each) if r is not None and not r["ok"])
        print(f"{suite:11} {name:34} {marks[0]:6} {marks[1]:8} {why[:150]}")
    for suite in sorted({s for s, _ in names}):
        for t in TOOLS:
            of = _of(rows, suite, t)
            if of:
                ok = sum(r["ok"] for r in of)
                print(f"{suite}: {t} {ok} of {len(of)} ({100 * ok / len(of):.1f} %)")


if __name__ == "__main__":
    raise SystemExit(main())
