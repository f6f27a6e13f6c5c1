"""Small networks, one for each thing that couples channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """conv-bn-relu stem, a residual block, a classifier."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv1, self.bn1 = nn.Conv2d(width, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, width, 3, padding=1), nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.stem(x)))
        x = F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


class Caching(nn.Module):
    """Keeps a tensor made of a weight while it is evaluated, as LeViT does; has a parameter that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.strength, self.unread = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
        self.cache: Tensor | None = None

    def train(self, mode: bool = True) -> Caching:
        self.cache = None if mode else self.cache
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.cache is None:
            self.cache = self.strength.exp()
        return self.fc(self.stem(x).mean((2, 3)) * self.cache)


class Gated(nn.Module):
    """Depthwise convolution and squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn = nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.down, self.up = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.project = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.depthwise(F.silu(self.bn(self.expand(x)))))
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.project(x * gate).mean((2, 3))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 12, 1)
        self.b = nn.Conv2d(12, 24, 3, padding=1, groups=3)
        self.c = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.a(x))))).mean((2, 3))


class Dense(nn.Module):
    """Every layer reads the concatenation of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(6 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.norm, self.fc = nn.BatchNorm2d(18), nn.Linear(18, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(F.relu(x))], 1)
        return self.fc(F.relu(self.norm(x)).mean((2, 3)))


class Shuffle(nn.Module):
    """ShuffleNet: split, transform one half, interleave."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.stem(x)).chunk(2, dim=1)
        x = torch.cat([a, F.relu(self.branch(b))], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.fc(x.mean((2, 3)))


class Normed(nn.Module):
    """Group norm whose groups can go as a whole."""

    def __init__(self, groups: int = 4) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 1), nn.GroupNorm(groups, 16), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.norm(self.a(x)))).mean((2, 3))


class Attention(nn.Module):
    def __init__(self, dim: int = 24, num_heads: int = 3) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        a = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1)
        return self.proj((a @ v).transpose(1, 2).reshape(b, n, self.num_heads * self.head_dim))


class Transformer(nn.Module):
    """Two patches wide, one block; `norm` None leaves the layer norms out."""

    def __init__(self, dim: int = 24, num_heads: int = 3, norm: bool = True) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.position = nn.Parameter(torch.randn(1, 4, dim))
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()
        self.attn = Attention(dim, num_heads)
        self.up, self.down = nn.Linear(dim, 32), nn.Linear(32, dim)
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.position
        x = x + self.attn(self.norm(x))
        x = x + self.down(F.gelu(self.up(x)))
        return self.head(x.mean(1))


class Stubborn(nn.Module):
    """A number that no attribute holds."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.out = Reshaper(), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(x))


class Reshaper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).view(x.shape[0], 12, -1).mean(-1)


class Odd(nn.Module):
    """An operator that nobody has a rule for, in the middle of a network."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 10), nn.Linear(10, 8)
        self.c, self.d = nn.Linear(8, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(F.relu(self.a(x.flatten(1)[:, :6])))
        x = torch.renorm(x, 2, 0, 1.0)
        return self.d(F.relu(self.c(x)))


class Between(nn.Module):
    """Something between two convolutions."""

    def __init__(self, middle: nn.Module, channels: int = 12, out: int | None = None) -> None:
        super().__init__()
        self.a, self.middle, self.b = nn.Conv2d(3, channels, 1), middle, nn.Conv2d(out or channels, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.middle(self.a(x))).mean((2, 3))


class Does(nn.Module):
    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


class Mixing(nn.Module):
    """Rows of a table and an einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(12, 7))
        self.out = nn.Parameter(torch.randn(7, 12))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,cd,de->behw", x, self.table, self.out)


class HalfSplit(nn.Module):
    """A cross-stage split whose size is worked out from an attribute; only one half is transformed."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.conv = 12, nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.split(self.width // 2, dim=1)
        return torch.cat([a, F.relu(self.conv(b), inplace=True)], 1)


class Shortcut(nn.Module):
    """ResNet's option A: the identity is subsampled and padded with zero channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.pad, self.fc = 4, nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return self.fc(x.mean((2, 3)))


class Placed(nn.Module):
    """Adds an encoding of places, which a layer makes anew from no input, once for all images of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.place = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(2, 12, 1)
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        across = torch.linspace(-1, 1, x.shape[-1])
        places = torch.stack(torch.meshgrid(across, across, indexing="ij"))[None]
        return self.head((self.stem(x) + self.place(places)).relu()).mean((2, 3))


BETWEEN: dict[str, Callable[[], nn.Module]] = {
    "hardswish": lambda: Between(nn.Hardswish()),
    "prelu": lambda: Between(nn.PReLU(12)),
    "glu": lambda: Between(nn.GLU(dim=1), 12, 6),
    "transposed convolution": lambda: Between(nn.ConvTranspose2d(12, 10, 2, 2), 12, 10),
    "pixel shuffle": lambda: Between(nn.PixelShuffle(2), 12, 3),
    "pixel unshuffle": lambda: Between(nn.PixelUnshuffle(2), 12, 48),
    "channel shuffle": lambda: Between(nn.ChannelShuffle(3)),
    "upsampling": lambda: Between(nn.Upsample(scale_factor=2, mode="bilinear")),
    "einsum": lambda: Between(Mixing()),
    "half split": lambda: Between(HalfSplit()),
    "unfold and fold": lambda: Between(
        Does(lambda x: F.fold(F.unfold(x, 3, padding=1), x.shape[-2:], kernel_size=3, padding=1))
    ),
    "windows": lambda: Between(
        Does(
            lambda x: (
                x.unflatten(2, (2, 4)).unflatten(4, (2, 4)).transpose(3, 4).flatten(4).sum(4).flatten(2, 3)[..., None]
            )
        )
    ),
    "sums over space": lambda: Between(Does(lambda x: x * x.square().sum((2, 3), keepdim=True).sqrt())),
    "option A shortcut": Shortcut,
}


def image(size: int = 8, batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))
