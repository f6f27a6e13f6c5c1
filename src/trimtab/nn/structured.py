"""Linear layers whose weight is a chain of small cores: low rank, Kronecker sums and matrix product operators in one.

A weight W (out, in) is read as a tensor: out = o_1 ... o_N and in = i_1 ... i_N, and each output factor stands next to
its input factor, T[(o_1 i_1), ..., (o_N i_N)]. Successive SVDs split T into cores A_k (r_{k-1}, o_k, i_k, r_k) with
r_0 = r_N = 1 (Oseledets, "Tensor-train decomposition", 2011, Algorithm 1, on interleaved indices). Special cases:

- sites (o, 1) and (1, i): the plain SVD, r (o + i) weights;
- two balanced sites: a sum of r Kronecker products, at r = 1 the best single one (Van Loan and Pitsianis, 1993);
- more sites: a matrix product operator.

Where the sites' product is larger than the layer, weight and input are padded with zeros and surplus outputs dropped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Sites = tuple[int, ...]
MODES = ("auto", "factored", "dense")
_PADDING = 1.1  # a size may grow by a tenth to become a product of balanced factors
_RANDOMIZED = 2048  # smaller side of a matrix from which on a randomised SVD may serve
_TINY = 1e-6  # singular values below this share of the largest are not divided by


class StructuredLinear(nn.Module):
    """A linear layer (..., in_features) -> (..., out_features) with a factorized weight.

    Args:
        out_sites, in_sites: factors of the two sizes, as many of each; their products may exceed the sizes.
        ranks: bond dimensions, one fewer than sites; an int is capped at the rank that each bond can have.
        bias: whether it adds a bias.
        mode: how it runs. "factored": core by core, the weight is never built. "dense": the weight is built from the
            cores in each pass, then used once. "auto": whichever takes fewer multiply-accumulates for the number of
            tokens that came; exported, it is factored, so that the file stays small.

    Raises:
        ValueError: sites, ranks or mode do not fit.

    >>> layer = StructuredLinear(216, 216, out_sites=(6, 6, 6), in_sites=(6, 6, 6), ranks=5, bias=False)
    >>> layer.params(), layer(torch.zeros(2, 7, 216)).shape
    (1260, torch.Size([2, 7, 216]))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        out_sites: Sequence[int],
        in_sites: Sequence[int],
        ranks: int | Sequence[int],
        bias: bool = True,
        mode: str = "auto",
    ) -> None:
        super().__init__()
        check_sites(out_features, in_features, out_sites, in_sites)
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.in_features, self.out_features = in_features, out_features
        self.out_sites, self.in_sites = tuple(out_sites), tuple(in_sites)
        self.ranks = bond_ranks(self.out_sites, self.in_sites, ranks)
        self.mode = mode
        bonds = (1, *self.ranks, 1)
        shapes = zip(bonds[:-1], self.out_sites, self.in_sites, bonds[1:])
        self.cores = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in shapes)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random cores whose product has the variance that `nn.Linear` gives its weight, 1 / (3 in)."""
        std = (1 / (3 * self.in_features) / math.prod(self.ranks)) ** (0.5 / len(self.cores))
        for core in self.cores:
            nn.init.normal_(core, std=std)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -(self.in_features**-0.5), self.in_features**-0.5)

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        out_sites: Sequence[int],
        in_sites: Sequence[int],
        ranks: int | Sequence[int],
        mode: str = "auto",
    ) -> StructuredLinear:
        """The layer nearest to a dense one with `weight` (out, in) that successive truncated SVDs find.

        Exact when every rank is the full one; for two sites the error is the tail of the singular values, for more at
        most the root of the summed squared tails of all bonds.
        """
        out_features, in_features = weight.shape
        with torch.random.fork_rng(devices=[]):
            layer = cls(
                in_features, out_features, out_sites=out_sites, in_sites=in_sites, ranks=ranks, bias=bias is not None,
                mode=mode,
            ).to(device=weight.device, dtype=weight.dtype)  # fmt: skip
        with torch.no_grad():
            for core, value in zip(layer.cores, decompose(weight, layer.out_sites, layer.in_sites, layer.ranks)):
                core.copy_(value)
            if layer.bias is not None and bias is not None:
                layer.bias.copy_(bias)
        return layer

    def to_dense(self) -> Tensor:
        """The weight (out, in) that the cores make; gradients flow through."""
        return contract(list(self.cores))[: self.out_features, : self.in_features]

    @property
    def weight(self) -> Tensor:
        """`to_dense()`, for code that reads a linear layer's weight, such as `nn.MultiheadAttention`."""
        return self.to_dense()

    def forward(self, x: Tensor) -> Tensor:
        if self._is_dense(x):
            return F.linear(x, self.to_dense(), self.bias)
        y = apply_cores(x, list(self.cores), self.out_features)
        return y if self.bias is None else y + self.bias

    def params(self) -> int:
        """Weights in the cores and the bias."""
        return sum(p.numel() for p in self.parameters())

    def macs(self, tokens: int = 1, mode: str | None = None) -> int:
        """Multiply-accumulates for so many tokens in a mode (its own by default)."""
        mode = mode or self.mode
        factored = tokens * min(sweep_macs(self.out_sites, self.in_sites, self.ranks))
        dense = tokens * self.in_features * self.out_features
        dense += contraction_macs(self.out_sites, self.in_sites, self.ranks)
        return {"factored": factored, "dense": dense, "auto": min(factored, dense)}[mode]

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, out_sites={self.out_sites}, "
            f"in_sites={self.in_sites}, ranks={self.ranks}, bias={self.bias is not None}, mode={self.mode!r}"
        )

    def _is_dense(self, x: Tensor) -> bool:
        if self.mode != "auto" or _exporting():
            return self.mode == "dense"
        tokens = x.numel() // self.in_features
        return self.macs(tokens, "dense") < self.macs(tokens, "factored")


# ------------------------------------------------------------------------------------------------------------- products


def apply_cores(x: Tensor, cores: Sequence[Tensor], out_features: int) -> Tensor:
    """The product of x (..., in) with the weight of some cores (r, o, i, r'), without building it: (..., out).

    Sites are summed over one by one, from the first or from the last, whichever takes fewer multiply-accumulates.
    """
    out_sites, in_sites = tuple(c.shape[1] for c in cores), tuple(c.shape[2] for c in cores)
    first, last = sweep_macs(out_sites, in_sites, tuple(c.shape[3] for c in cores[:-1]))
    size = math.prod(in_sites)
    if size > x.shape[-1]:
        x = F.pad(x, (0, size - x.shape[-1]))
    state = x.reshape(-1, *in_sites)
    if last < first:
        state = state.permute(0, *range(len(in_sites), 0, -1))
        state = _sweep(state, [c.permute(3, 1, 2, 0) for c in reversed(cores)])
        state = state.permute(0, *range(len(in_sites), 0, -1))
    else:
        state = _sweep(state, cores)
    return state.reshape(*x.shape[:-1], math.prod(out_sites))[..., :out_features]


def _sweep(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """x (B, i_1, ..., i_N) -> (B, o_1, ..., o_N), first site first."""
    out_sites = [core.shape[1] for core in cores]
    rest = math.prod(x.shape[1:])
    for left, o, i, right in (core.shape for core in cores):
        core, cores = cores[0], cores[1:]
        rest //= i
        matrix = core.permute(1, 3, 0, 2).reshape(o * right, left * i)
        if rest == 1:
            x = F.linear(x.reshape(-1, left * i), matrix)  # (B o_1 .. o_{k-1}, o_k r_k)
        else:
            x = matrix @ x.reshape(-1, left * i, rest)  # (B o_1 .. o_{k-1}, o_k r_k, i_{k+1} .. i_N)
    return x.reshape(-1, *out_sites)


def contract(cores: Sequence[Tensor]) -> Tensor:
    """The matrix (o_1 ... o_N, i_1 ... i_N) that some cores (r, o, i, r') make."""
    product = cores[0].reshape(-1, cores[0].shape[3])
    for core in cores[1:]:
        product = (product @ core.reshape(core.shape[0], -1)).reshape(-1, core.shape[3])
    n = len(cores)
    product = product.reshape([size for core in cores for size in core.shape[1:3]])  # (o_1, i_1, o_2, i_2, ...)
    return product.permute(*range(0, 2 * n, 2), *range(1, 2 * n, 2)).reshape(
        math.prod(core.shape[1] for core in cores), -1
    )


# -------------------------------------------------------------------------------------------------------- decomposition


def decompose(
    weight: Tensor, out_sites: Sites, in_sites: Sites, ranks: Sequence[int], *, exact: bool = True
) -> list[Tensor]:
    """Cores (r, o, i, r') of a matrix (out, in), truncated to `ranks`.

    Not `exact`, a randomised SVD serves where the matrix is large and few values are wanted.
    The singular values of each bond are shared evenly by the two cores that it joins, so that all train alike.
    """
    carry, bonds, values = _interleaved(weight, out_sites, in_sites), (1, *ranks, 1), []
    cores = []
    for k, rank in enumerate(ranks):
        u, s, vh = _svd(carry.reshape(bonds[k] * out_sites[k] * in_sites[k], -1), rank, exact)
        cores.append(u.reshape(bonds[k], out_sites[k], in_sites[k], rank))
        values.append(s)
        carry = s[:, None] * vh
    cores.append(carry.reshape(bonds[-2], out_sites[-1], in_sites[-1], 1))
    for k, s in enumerate(values):
        root = s.clamp_min(max(_TINY * float(s[0]), torch.finfo(s.dtype).tiny)).sqrt()
        cores[k] = cores[k] * root
        cores[k + 1] = cores[k + 1] / root.reshape(-1, 1, 1, 1)
    return [core.to(weight.dtype) for core in cores]


def spectra(weight: Tensor, out_sites: Sites, in_sites: Sites) -> list[Tensor]:
    """The singular values at each bond of a matrix (out, in), largest first: what a truncation there gives away."""
    t = _interleaved(weight, out_sites, in_sites)
    sizes = [o * i for o, i in zip(out_sites, in_sites)]
    return [torch.linalg.svdvals(t.reshape(math.prod(sizes[:k]), -1)) for k in range(1, len(sizes))]


def _interleaved(weight: Tensor, out_sites: Sites, in_sites: Sites) -> Tensor:
    w = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    w = F.pad(w, (0, math.prod(in_sites) - w.shape[1], 0, math.prod(out_sites) - w.shape[0]))
    n = len(out_sites)
    return w.reshape(*out_sites, *in_sites).permute([k + j * n for k in range(n) for j in (0, 1)])


def _svd(matrix: Tensor, rank: int, exact: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` leading singular triples."""
    if not exact and min(matrix.shape) >= _RANDOMIZED and rank <= min(matrix.shape) // 4:
        with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=rank + 16, niter=4)
        vh = v.mT
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank]


# ----------------------------------------------------------------------------------------------------- sites and counts


def balanced_sites(out_features: int, in_features: int, sites: int | str = 2) -> tuple[Sites, Sites]:
    """Factors of the two sizes for so many sites, as equal as possible, or "lowrank" for the plain SVD.

    Large output factors meet small input factors, so that sites hold about equally much. A size that has no balanced
    factors is padded, by a tenth at most where that helps.

    >>> balanced_sites(512, 128), balanced_sites(10, 64, "lowrank"), balanced_sites(257, 257)
    (((32, 16), (8, 16)), ((10, 1), (1, 64)), ((20, 13), (13, 20)))
    """
    if sites == "lowrank":
        return (out_features, 1), (1, in_features)
    if isinstance(sites, bool) or not isinstance(sites, int) or sites < 2:
        raise ValueError(f"sites must be 'lowrank' or an integer of at least 2, got {sites!r}")
    return tuple(reversed(_factors(out_features, sites))), _factors(in_features, sites)


def check_sites(out_features: int, in_features: int, out_sites: Sequence[int], in_sites: Sequence[int]) -> None:
    """Raise ValueError unless the sites cover a matrix (out, in)."""
    if len(out_sites) != len(in_sites) or len(out_sites) < 2:
        raise ValueError(f"out_sites and in_sites must be equally many, 2 or more, got {out_sites} and {in_sites}")
    for name, size, factors in (("out_sites", out_features, out_sites), ("in_sites", in_features, in_sites)):
        if min(factors) < 1 or math.prod(factors) < size:
            raise ValueError(f"{name} must be positive and multiply to at least {size}, got {tuple(factors)}")


def bond_ranks(out_sites: Sites, in_sites: Sites, ranks: int | Sequence[int]) -> tuple[int, ...]:
    """One rank per bond: those given, or one number for all, capped at what each bond can have.

    >>> bond_ranks((6, 6, 6), (6, 6, 6), 50)
    (36, 36)
    """
    sizes = [o * i for o, i in zip(out_sites, in_sites)]
    wanted = [ranks] * (len(sizes) - 1) if isinstance(ranks, int) else list(ranks)
    if len(wanted) != len(sizes) - 1 or min(wanted) < 1:
        raise ValueError(f"ranks must be {len(sizes) - 1} positive integers, or one for all, got {ranks}")
    found = [1]
    for k, rank in enumerate(wanted):
        found.append(min(rank, found[-1] * sizes[k], math.prod(sizes[k + 1 :])))
    return tuple(found[1:])


def core_params(out_sites: Sites, in_sites: Sites, ranks: Sequence[int]) -> int:
    """Weights in the cores, sum of r_{k-1} o_k i_k r_k.

    >>> core_params((64, 64), (64, 64), (614,)) / 4096**2  # 30 % of a 4096 x 4096 matrix
    0.2998046875
    """
    bonds = (1, *ranks, 1)
    return sum(bonds[k] * o * i * bonds[k + 1] for k, (o, i) in enumerate(zip(out_sites, in_sites)))


def sweep_macs(out_sites: Sites, in_sites: Sites, ranks: Sequence[int]) -> tuple[int, int]:
    """Multiply-accumulates per token of the factored product, first site first and last site first.

    >>> min(sweep_macs((64, 64), (64, 64), (32,))) == 4096**2  # as many as the dense matrix already at rank 32
    True
    """

    def one_way(outs: Sites, ins: Sites, bonds: Sequence[int]) -> int:
        return sum(
            math.prod(outs[: k + 1]) * math.prod(ins[k:]) * bonds[k] * bonds[k + 1] for k in range(len(outs))
        )  # fmt: skip

    bonds = (1, *ranks, 1)
    return one_way(out_sites, in_sites, bonds), one_way(out_sites[::-1], in_sites[::-1], bonds[::-1])


def contraction_macs(out_sites: Sites, in_sites: Sites, ranks: Sequence[int]) -> int:
    """Multiply-accumulates of building the weight from the cores."""
    bonds, done, total = (1, *ranks, 1), 1, 0
    for k, (o, i) in enumerate(zip(out_sites, in_sites)):
        if k:
            total += done * bonds[k] * o * i * bonds[k + 1]
        done *= o * i
    return total


def _factors(n: int, count: int) -> Sites:
    """`count` factors, rising, with a product of at least `n`: the least padding that gives balanced ones."""
    goal = math.ceil(n ** (1 / count) - 1e-9)
    best = (*[goal] * count,)
    for size in range(n, math.floor(n * _PADDING) + 1):
        found = _split(size, count)
        if found is not None and max(found) <= 2 * goal:
            return found
    return best


def _split(n: int, count: int) -> Sites | None:
    """Exactly `count` factors of n, each the divisor nearest to the root of what is left."""
    if count == 1:
        return (n,)
    root = n ** (1 / count)
    divisors = [d for d in range(2, n + 1) if n % d == 0]
    if not divisors:
        return None
    near = min(divisors, key=lambda d: abs(math.log(d / root)))
    rest = _split(n // near, count - 1)
    return None if rest is None else tuple(sorted((near, *rest)))


def _exporting() -> bool:
    """Whether a graph is being recorded that must serve any batch size."""
    recording = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return recording() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()
