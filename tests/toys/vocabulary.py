"""What timm's networks are made of, a block per mechanism, for the fuzz test; [B, chs, H, W] → [B, out_chs, H, W].

Beside the blocks of ``axes_nets``, which are looked at one by one: here the point is variety. Sizes are written as real
code writes them: attributes, lists, arithmetic on shapes, and numbers that lost their origin.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from timm.layers import (
    BatchNormAct2d,
    EcaModule,
    GatherExcite,
    GlobalContext,
    GroupNormAct,
    LayerNorm2d,
    RmsNorm2d,
    ScaledStdConv2d,
    SelectiveKernel,
    SplitAttn,
    StdConv2d,
)
from timm.layers.cbam import CbamModule
from timm.layers.coord_attn import CoordAttn
from timm.layers.grn import GlobalResponseNorm
from torch import Tensor, nn

from toys.blocks import Block


def tokens(x: Tensor) -> Tensor:
    """[B, C, H, W] → [B, H * W, C]."""
    return x.flatten(2).transpose(1, 2)


def image(t: Tensor, like: Tensor) -> Tensor:
    """[B, H * W, C] → [B, C, H, W]."""
    return t.transpose(1, 2).reshape(t.shape[0], -1, *like.shape[2:])


class Plain(nn.Module):
    """One layer that maps ``chs`` channels to ``width``, between two convolutions or after one."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.out_chs = width
        self.build(chs, width)

    def build(self, chs: int, width: int) -> None:
        raise NotImplementedError


# ------------------------------------------------------------------------------------------- convolutions, norms


class Dilated(Plain):
    def build(self, chs: int, width: int) -> None:
        self.conv = nn.Conv2d(chs, 2 * width, 3, padding=2, dilation=2)
        self.up = nn.ConvTranspose2d(2 * width, 2 * width, 2, stride=2, groups=2 * width)
        self.down = nn.Conv2d(2 * width, width, 3, stride=2, padding=1, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu6(self.up(self.conv(x))))


class ConvNext(nn.Module):
    """Depthwise, channels last, layer norm, MLP with a global response norm, layer scale."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.out_chs = chs
        self.dw, self.norm = nn.Conv2d(chs, chs, 3, padding=1, groups=chs), nn.LayerNorm(chs)
        self.fc1, self.fc2 = nn.Linear(chs, 3 * width), nn.Linear(3 * width, chs)
        self.grn = GlobalResponseNorm(3 * width)
        self.gamma = nn.Parameter(torch.ones(chs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = self.fc2(self.grn(F.gelu(self.fc1(y)))) * self.gamma
        return x + y.permute(0, 3, 1, 2)


class Norms2d(Plain):
    def build(self, chs: int, width: int) -> None:
        self.a, self.b, self.c = nn.Conv2d(chs, 6, 1), nn.Conv2d(6, 4, 1), nn.Conv2d(4, width, 1)
        self.layer, self.rms = LayerNorm2d(6), RmsNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.silu(self.rms(self.b(F.gelu(self.layer(self.a(x)))))))


class NormActs(Plain):
    def build(self, chs: int, width: int) -> None:
        self.a, self.b = nn.Conv2d(chs, 6, 1, bias=False), nn.Conv2d(6, 2 * width, 1)
        self.first, self.second = BatchNormAct2d(6, act_layer=nn.SiLU), GroupNormAct(2 * width, num_groups=2)
        self.c = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.second(self.b(self.first(self.a(x)))))


class InstanceNorm(Plain):
    def build(self, chs: int, width: int) -> None:
        self.conv, self.norm = nn.Conv2d(chs, width, 1), nn.InstanceNorm2d(width, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return F.mish(self.norm(self.conv(x)))


class Standardised(Plain):
    """Weight standardisation in two spellings, one of them grouped."""

    def build(self, chs: int, width: int) -> None:
        self.a, self.b = ScaledStdConv2d(chs, 8, 3, padding=1), StdConv2d(8, 8, 3, padding=1, groups=2, bias=True)
        self.c = ScaledStdConv2d(8, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.silu(self.b(F.silu(self.a(x)))))


class BatchNormedTokens(Plain):
    """LeViT: a batch norm over flattened tokens."""

    def build(self, chs: int, width: int) -> None:
        self.fc, self.bn = nn.Linear(chs, width, bias=False), nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        t = self.fc(tokens(x))
        return image(F.hardswish(self.bn(t.flatten(0, 1)).reshape_as(t)), x)


class Normalised(Plain):
    """An L2 norm over channels of queries and keys with a learnt temperature (Swin v2)."""

    def build(self, chs: int, width: int) -> None:
        self.heads = 2
        self.qkv, self.proj = nn.Linear(chs, 24, bias=False), nn.Linear(8, width)
        self.temperature = nn.Parameter(torch.zeros(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        t = tokens(x)
        b, n, _ = t.shape
        q, k, v = self.qkv(t).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        a = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        a = (a * torch.clamp(self.temperature, max=math.log(100.0)).exp()).softmax(-1)
        return image(self.proj((a @ v).transpose(1, 2).reshape(b, n, -1)), x)


# ------------------------------------------------------------------------------------------- gates


class GatedMlps(Plain):
    """SwiGLU with both halves in one weight, in either order, and in two weights."""

    def build(self, chs: int, width: int) -> None:
        self.packed, self.mid = nn.Linear(chs, 2 * width), nn.Linear(width, 4)
        self.other, self.back = nn.Linear(4, 10), nn.Linear(5, 4)
        self.gate, self.value, self.out = nn.Linear(4, 7), nn.Linear(4, 7, bias=False), nn.Linear(7, width)
        self.norm = nn.LayerNorm(7)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.packed(tokens(x)).chunk(2, dim=-1)
        t = self.mid(F.silu(a) * b)
        half = self.other.out_features // 2
        y = self.other(t)
        t = t + self.back(y[..., :half] * F.gelu(y[..., half:]))
        return image(self.out(self.norm(F.silu(self.gate(t)) * self.value(t))), x)


class SpatialGate(nn.Module):
    """gMLP: half of the channels gate the other half after mixing tokens."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.out_chs = chs
        self.fc1, self.fc2 = nn.Linear(chs, 2 * width), nn.Linear(width, chs)
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        u, v = F.gelu(self.fc1(tokens(x))).chunk(2, dim=-1)
        v = self.mix(self.norm(v).transpose(-1, -2)).transpose(-1, -2)
        return x + image(self.fc2(u * v), x)


class TimmGate(Plain):
    """A gate of timm between two convolutions."""

    def build(self, chs: int, width: int) -> None:
        self.conv, self.gate, self.after = nn.Conv2d(chs, 8, 1), self.made(8), nn.Conv2d(8, width, 1)

    def made(self, chs: int) -> nn.Module:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.gate(self.conv(x)))


class Eca(TimmGate):
    def made(self, chs: int) -> nn.Module:
        return EcaModule(chs)


class Cbam(TimmGate):
    def made(self, chs: int) -> nn.Module:
        return CbamModule(chs, rd_ratio=0.5, rd_divisor=1)


class Coordinates(TimmGate):
    def made(self, chs: int) -> nn.Module:
        return CoordAttn(chs, rd_ratio=0.5, rd_divisor=1)


class Context(TimmGate):
    def made(self, chs: int) -> nn.Module:
        return GlobalContext(chs, rd_ratio=0.5, rd_divisor=1, fuse_add=True)


class Gather(TimmGate):
    def made(self, chs: int) -> nn.Module:
        return GatherExcite(chs, extent=2, use_mlp=False)


class Split(Plain):
    def build(self, chs: int, width: int) -> None:
        self.conv, self.split = nn.Conv2d(chs, 8, 1), SplitAttn(8, 2 * width, kernel_size=3, groups=2, rd_channels=4)
        self.after = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.split(self.conv(x)))


class Selective(Plain):
    def build(self, chs: int, width: int) -> None:
        self.conv = nn.Conv2d(chs, 8, 1)
        self.selective = SelectiveKernel(8, 2 * width, groups=2, rd_ratio=0.5, rd_divisor=1, split_input=width % 2 == 0)
        self.after = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.selective(self.conv(x)))


# ------------------------------------------------------------------------------------------- splits and joins


class UnevenSplit(Plain):
    """Different kernels for different channels (MixNet), written with a list of sizes."""

    def build(self, chs: int, width: int) -> None:
        self.sizes = [width, 2, 3]
        self.conv = nn.Conv2d(chs, width + 5, 1)
        self.kernels = nn.ModuleList(
            nn.Conv2d(n, n, k, padding=k // 2, groups=n) for n, k in zip(self.sizes, (1, 3, 5), strict=True)
        )
        self.after = nn.Conv2d(width + 5, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.conv(x), self.sizes, 1)
        return self.after(torch.cat([f(p) for f, p in zip(self.kernels, parts, strict=True)], 1))


class Res2(Plain):
    """Res2Net: each part sees what came of the part before."""

    def build(self, chs: int, width: int) -> None:
        self.width, self.scales = width, 3
        self.conv, self.bn = nn.Conv2d(chs, 3 * width, 1), nn.BatchNorm2d(3 * width)
        self.parts = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.after = nn.Conv2d(3 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        pieces = torch.split(F.relu(self.bn(self.conv(x))), self.width, 1)
        made, last = [], pieces[0]
        for i, conv in enumerate(self.parts):
            last = pieces[i] if i == 0 else last + pieces[i]
            last = F.relu(conv(last))
            made.append(last)
        return self.after(torch.cat([*made, pieces[self.scales - 1]], 1))


class Ghost(Plain):
    """Half of the channels are cheap copies; what is too much is cut off."""

    def build(self, chs: int, width: int) -> None:
        self.wanted, half = 2 * width - 1, width
        self.primary, self.cheap = nn.Conv2d(chs, half, 1), nn.Conv2d(half, half, 3, padding=1, groups=half)
        self.out_chs = 2 * width - 1

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.primary(x))
        return torch.cat([a, self.cheap(a)], dim=1)[:, : self.wanted, :, :]


class CrossStage(Plain):
    """CSP: one branch by-passes a block; chunks of one convolution."""

    def build(self, chs: int, width: int) -> None:
        self.expand, self.block = nn.Conv2d(chs, 2 * width, 1), nn.Conv2d(width, width, 3, padding=1)
        self.after = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.expand(x), 0.1)
        a, b = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
        return self.after(torch.cat([self.block(a) + a, b], 1))


class Interleaved(Plain):
    """Channels of two convolutions in turn, then back in two halves."""

    def build(self, chs: int, width: int) -> None:
        self.a, self.b = nn.Conv2d(chs, width, 1), nn.Conv2d(chs, width, 1)
        self.after = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack([self.a(x), self.b(x)], dim=2).flatten(1, 2)
        return self.after(F.relu(y)) * self.a(x)


class Repeated(Plain):
    """Channels repeated as a block and one by one."""

    def build(self, chs: int, width: int) -> None:
        self.conv, self.after = nn.Conv2d(chs, width, 1), nn.Conv2d(4 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        return self.after(torch.cat([y.repeat(1, 2, 1, 1), y.repeat_interleave(2, 1)], 1))


class ZeroPadded(nn.Module):
    """A residual between widths: the wider one is cut, the narrower one padded."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv, self.widths = nn.Conv2d(chs, width, 1), (chs, width)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        had, want = self.widths
        x = F.pad(x, (0, 0, 0, 0, 0, want - had)) + self.conv(x) if want > had else x[:, :want] + self.conv(x)
        return F.relu(x)


class Shuffled(Plain):
    """Channel shuffles in two spellings around a grouped convolution."""

    def build(self, chs: int, width: int) -> None:
        self.groups = 2
        self.conv, self.grouped = nn.Conv2d(chs, 2 * width, 1), nn.Conv2d(2 * width, 2 * width, 1, groups=2)
        self.after = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = x.reshape(x.shape[0], self.groups, -1, *x.shape[2:]).permute(0, 2, 1, 3, 4).flatten(1, 2)
        x = F.relu(self.grouped(x)).unflatten(1, (-1, self.groups)).transpose(1, 2)
        return self.after(x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]))


# ------------------------------------------------------------------------------------------- space


class SpaceToDepth(Plain):
    def build(self, chs: int, width: int) -> None:
        self.step = 2
        self.conv, self.deep = nn.Conv2d(chs, width, 1), nn.Conv2d(4 * width, 8, 1)
        self.out = nn.Conv2d(2, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        b, c, h, w = x.shape
        s = self.step
        x = x.view(b, c, h // s, s, w // s, s).permute(0, 3, 5, 1, 2, 4).reshape(b, c * s * s, h // s, w // s)
        return self.out(F.pixel_shuffle(F.relu(self.deep(x)), 2))


class Unshuffled(Plain):
    def build(self, chs: int, width: int) -> None:
        self.conv, self.deep, self.out = nn.Conv2d(chs, 3, 1), nn.Conv2d(12, 5, 1), nn.Conv2d(5, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.out(F.relu(self.deep(F.pixel_unshuffle(self.conv(x), 2)))), scale_factor=2)


class PatchMerging(Plain):
    """Swin: four neighbours side by side, normed and reduced."""

    def build(self, chs: int, width: int) -> None:
        self.norm, self.reduce = nn.LayerNorm(4 * chs), nn.Linear(4 * chs, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        y = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        return F.interpolate(self.reduce(self.norm(y)).permute(0, 3, 1, 2), size=(8, 8), mode="bilinear")


class PatchMergingView(Plain):
    """The same by a view."""

    def build(self, chs: int, width: int) -> None:
        self.norm, self.reduce = nn.LayerNorm(4 * chs), nn.Linear(4 * chs, 2 * width)
        self.mix = nn.Conv2d(2 * width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        y = x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
        y = self.reduce(self.norm(y)).permute(0, 3, 1, 2)
        return F.interpolate(self.mix(y), scale_factor=2, mode="nearest")


class ShiftedWindows(nn.Module):
    """Window attention on a rolled map, with a table of relative positions."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.out_chs, self.window, self.heads = chs, 4, 2
        self.norm, self.qkv, self.proj = nn.LayerNorm(chs), nn.Linear(chs, 24), nn.Linear(8, chs)
        self.table = nn.Parameter(torch.zeros(7 * 7, 2))
        at = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        apart = at[:, :, None] - at[:, None] + 3
        self.register_buffer("index", apart[0] * 7 + apart[1], persistent=False)
        self.scale = 4**-0.5

    def forward(self, x: Tensor) -> Tensor:
        y = torch.roll(self.norm(x.permute(0, 2, 3, 1)), (-2, -2), (1, 2))
        b, h, w, c = y.shape
        s = self.window
        y = y.view(b, h // s, s, w // s, s, c).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, s * s, c)
        qkv = self.qkv(y).reshape(len(y), s * s, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        a = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(s * s, s * s, -1).permute(2, 0, 1).contiguous()
        y = ((a + bias.unsqueeze(0)).softmax(-1) @ v).transpose(1, 2).reshape(len(y), s * s, -1)
        y = self.proj(y).view(b, h // s, w // s, s, s, -1).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1)
        return x + torch.roll(y, (2, 2), (1, 2)).permute(0, 3, 1, 2)


class Pyramid(Plain):
    """Feature pyramid: a coarse map is brought to the size of a fine one and added."""

    def build(self, chs: int, width: int) -> None:
        self.down, self.lateral, self.top = (nn.Conv2d(chs, 6, 3, 2, 1), nn.Conv2d(chs, 4, 1), nn.Conv2d(6, 4, 1))
        self.out = nn.Conv2d(4, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        coarse = self.top(F.relu(self.down(x)))
        return self.out(self.lateral(x) + F.interpolate(coarse, size=x.shape[-2:], mode="bilinear"))


class Pooled(Plain):
    """Max, average and adaptive pools; channels and places flattened together into a linear layer."""

    def build(self, chs: int, width: int) -> None:
        self.conv, self.fc, self.after = nn.Conv2d(chs, 5, 1), nn.Linear(20, 6), nn.Conv2d(5, 6, 1)
        self.out = nn.Conv2d(6, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        y = self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))
        pooled = F.max_pool2d(x, 3, 1, 1) + F.avg_pool2d(x, 3, 1, 1)
        return self.out(self.after(pooled) + y[:, :, None, None])


class Lines(Plain):
    """One-dimensional convolutions over tokens."""

    def build(self, chs: int, width: int) -> None:
        self.a, self.b = nn.Conv1d(chs, 6, 3, padding=1), nn.Conv1d(6, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x.flatten(2)))).unflatten(2, x.shape[2:])


# ------------------------------------------------------------------------------------------- tokens


class ClassToken(nn.Module):
    """Class and register tokens, learnt positions, two layer-scaled branches in parallel; the first tokens gate."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.out_chs, self.num_prefix_tokens = chs, 3
        self.cls, self.reg = nn.Parameter(torch.zeros(1, 1, chs)), nn.Parameter(torch.zeros(1, 2, chs))
        self.pos = nn.Parameter(torch.zeros(1, 64, chs))
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(chs), nn.Linear(chs, 2 * width), nn.Linear(2 * width, chs)
        self.other, self.scale = nn.Linear(chs, chs), nn.Parameter(torch.ones(2, chs))

    def forward(self, x: Tensor) -> Tensor:
        t = tokens(x) + self.pos
        t = torch.cat([self.cls.expand(t.shape[0], -1, -1), self.reg.expand(t.shape[0], -1, -1), t], 1)
        y = self.norm(t)
        t = t + self.fc2(F.gelu(self.fc1(y))) * self.scale[0] + self.other(y) * self.scale[1]
        return image(t[:, self.num_prefix_tokens :] * t[:, : self.num_prefix_tokens].mean(1, keepdim=True).tanh(), x)


class MultiQuery(Plain):
    """Several query heads, one head of keys and values, reduced in space."""

    def build(self, chs: int, width: int) -> None:
        self.num_heads, self.dim = 3, 4
        self.q, self.k, self.v = nn.Conv2d(chs, 12, 1), nn.Conv2d(chs, 4, 2, 2), nn.Conv2d(chs, 5, 2, 2)
        self.proj, self.scale = nn.Conv2d(15, width, 1), 0.5

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        q = self.q(x).reshape(b, self.num_heads, self.dim, h * w).transpose(-1, -2)
        k, v = self.k(x).flatten(2), self.v(x).flatten(2)
        a = torch.einsum("bhnd,bdm->bhnm", q, k).mul(self.scale).softmax(-1)
        y = torch.einsum("bhnm,bdm->bhdn", a, v)
        return self.proj(y.reshape(b, -1, h, w))


class CrossAttention(Plain):
    """Learnt queries look at the map (attention pooling), the answer is added everywhere."""

    def build(self, chs: int, width: int) -> None:
        self.num_heads = 2
        self.latent, self.q = nn.Parameter(torch.zeros(1, 1, chs)), nn.Linear(chs, 8)
        self.kv, self.proj, self.out = nn.Linear(chs, 16), nn.Linear(8, chs), nn.Conv2d(chs, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        t = tokens(x)
        b, n, _ = t.shape
        q = self.q(self.latent.expand(b, -1, -1)).reshape(b, 1, self.num_heads, -1).transpose(1, 2)
        k, v = self.kv(t).reshape(b, n, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(x + self.proj(y).transpose(1, 2)[..., None])


class ChannelAttention(nn.Module):
    """XCiT: channels attend to channels."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.out_chs, self.num_heads = chs, 2
        self.qkv, self.proj, self.temperature = nn.Linear(chs, 24), nn.Linear(8, chs), nn.Parameter(torch.ones(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        t = tokens(x)
        b, n, _ = t.shape
        q, k, v = self.qkv(t).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 4, 1).unbind(0)
        a = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature).softmax(-1)
        return x + image(self.proj((a @ v).permute(0, 3, 1, 2).reshape(b, n, -1)), x)


class Focal(Plain):
    """FocalNet: one projection in three uneven parts: query, context, gates."""

    def build(self, chs: int, width: int) -> None:
        self.dim, self.levels = width, 2
        self.f = nn.Linear(chs, 2 * width + 3)
        self.local = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False) for _ in range(2))
        self.h, self.proj = nn.Conv2d(width, width, 1), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        q, context, gates = torch.split(y, (self.dim, self.dim, self.levels + 1), 1)
        total = torch.zeros_like(context)
        for level, layer in enumerate(self.local):
            context = F.gelu(layer(context))
            total = total + context * gates[:, level : level + 1]
        total = total + context.mean((2, 3), keepdim=True).tanh() * gates[:, self.levels :]
        return self.proj((q * self.h(total)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Recurrent(Plain):
    """Sequencer: recurrent layers along rows and columns."""

    kind: type[nn.RNNBase] = nn.LSTM
    both = True

    def build(self, chs: int, width: int) -> None:
        self.rnn = self.kind(chs, 4, num_layers=1 + width % 2, batch_first=True, bidirectional=self.both)
        self.fc = nn.Linear(8 if self.both else 4, width)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y, _ = self.rnn(x.permute(0, 2, 3, 1).reshape(-1, w, c))
        return self.fc(y.view(b, h, w, -1)).permute(0, 3, 1, 2)


class Gru(Recurrent):
    kind, both = nn.GRU, False


class Embedded(Plain):
    """Tables looked up by position, one through ``nn.Embedding``, one by ``gather``."""

    def build(self, chs: int, width: int) -> None:
        self.rows, self.table = nn.Embedding(9, chs), nn.Parameter(torch.zeros(12, chs))
        self.register_buffer("at", torch.arange(64) % 9)
        self.fc = nn.Linear(chs, width)

    def forward(self, x: Tensor) -> Tensor:
        t = tokens(x) + self.rows(self.at)
        picked = self.table.gather(0, self.at[:, None].expand(-1, self.table.shape[1]))
        return image(self.fc(t + picked), x)


# ------------------------------------------------------------------------------------------- weights, broadcasts


class Shared(nn.Module):
    """One convolution used twice, and a matrix used with its transpose."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.out_chs = chs
        self.conv, self.matrix = nn.Conv2d(chs, chs, 3, padding=1), nn.Linear(chs, 2 * width, bias=False)
        self.again = self.conv

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.again(F.relu(self.conv(x)))
        t = self.matrix(tokens(x)).relu()
        return x + image(F.linear(t, self.matrix.weight.t()), x)


class Broadcasts(Plain):
    """Sums of maps, vectors, rows and columns; parameters of every rank, one of them a number."""

    def build(self, chs: int, width: int) -> None:
        self.conv, self.vector = nn.Conv2d(chs, width, 1), nn.Linear(chs, width)
        self.bias, self.scale, self.number = (
            nn.Parameter(torch.zeros(1, width, 1, 1)),
            nn.Parameter(torch.ones(width, 1, 1)),
            nn.Parameter(torch.ones(())),
        )
        self.alpha = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) + self.bias
        a = self.alpha.softmax(0)
        y = a[0] * y + a[1] * y.mean(2, keepdim=True) + a[2] * y.mean(3, keepdim=True).relu()
        return (y * self.scale + self.vector(x.mean((2, 3)))[:, :, None, None]) * self.number


class Einsums(Plain):
    def build(self, chs: int, width: int) -> None:
        self.weight, self.mix = nn.Parameter(torch.zeros(6, chs)), nn.Parameter(torch.zeros(2, 3, width))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bchw,oc->bohw", x, self.weight).relu()
        heads, inner, _ = self.mix.shape
        y = y.reshape(y.shape[0], heads, inner, *y.shape[2:])
        return torch.einsum("bnihw,nio->bohw", y, self.mix)


class ConditionalConv(Plain):
    """CondConv: the kernel is a mixture of experts, a convolution a group for each image."""

    def build(self, chs: int, width: int) -> None:
        self.chs, self.width = chs, width
        self.router, self.experts = nn.Linear(chs, 3), nn.Parameter(torch.zeros(3, width * chs * 9))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        weight = (self.router(x.mean((2, 3))).sigmoid() @ self.experts).view(b * self.width, self.chs, 3, 3)
        y = F.conv2d(x.reshape(1, b * c, h, w), weight, padding=1, groups=b)
        return y.reshape(b, self.width, h, w)


class Masked(Plain):
    """``where``, ``masked_fill`` and comparisons of values."""

    def build(self, chs: int, width: int) -> None:
        self.a, self.b = nn.Conv2d(chs, width, 1), nn.Conv2d(chs, width, 1)
        self.register_buffer("mask", torch.arange(8) % 3 == 0)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        return torch.where(a > b, a, b * 0.5).masked_fill(self.mask, 0.0) + torch.maximum(a, b).clamp(-2, 2)


class Ordered(Plain):
    """Trap: what depends on the order or the number of channels."""

    def build(self, chs: int, width: int) -> None:
        self.a, self.b, self.c = nn.Conv2d(chs, 5, 1), nn.Conv2d(chs, 4, 1), nn.Conv2d(chs, 6, 1)
        self.after = nn.Conv2d(15, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.a(x).cumsum(1), self.b(x).flip(1), self.c(x).sort(1).values
        return self.after(torch.cat([a, b, c], 1) / (1 + self.c(x).abs().amax(1, keepdim=True)))


class Alternatives(Plain):
    """Trap: channels compete (maximum over pieces, soft choice, winner's index)."""

    def build(self, chs: int, width: int) -> None:
        self.conv, self.choice = nn.Conv2d(chs, 2 * width, 1), nn.Conv2d(chs, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).unflatten(1, (2, -1)).amax(1)
        first = (self.choice(x).argmax(1, keepdim=True) == 0).to(y.dtype)
        return y * self.choice(x).softmax(1)[:, :1] * (1 + first) + self.choice(x).logsumexp(1, keepdim=True)


# ------------------------------------------------------------------------------------------- numbers


class Numbers(Plain):
    """Sizes from attributes in views of every kind."""

    def build(self, chs: int, width: int) -> None:
        self.dims, self.shape, self.inner = [2, width], (2, width), 2 * width
        self.a, self.b, self.c = nn.Conv2d(chs, 2 * width, 1), nn.Conv2d(2 * width, 2 * width, 1), nn.Linear(width, 3)
        self.after = nn.Linear(6, width)

    @property
    def half(self) -> int:
        return self.inner >> 1

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        y = self.a(x).view(b, *self.dims, h, w).transpose(1, 2).reshape(b, self.inner, h, w)
        y = self.b(y).unflatten(1, self.shape).flatten(3)
        y = y.permute(0, 3, 1, 2).reshape(b * h * w, -1, self.half)
        rows, rest = divmod(y.shape[1] * self.half, self.half)
        y = self.c(y).view(b, h * w, rows + rest, -1)
        return image(self.after(y.flatten(2)), x)


class ListedNumbers(Plain):
    """Sizes in containers the trace does not look into: they are taken for literals."""

    def build(self, chs: int, width: int) -> None:
        self.config, self.nested = {"groups": 2, "width": width}, [(2, width), (width, 2)]
        self.conv, self.after = nn.Conv2d(chs, 2 * width, 1), nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y = y.reshape(y.shape[0], self.config["groups"], self.config["width"], *y.shape[2:]).relu()
        first, second = self.nested[1]
        return self.after(y.reshape(y.shape[0], first, second, *y.shape[3:]).flatten(1, 2))


class Looped(Plain):
    """Trap: as many rounds as there are heads, as many layers as there are channels."""

    def build(self, chs: int, width: int) -> None:
        self.heads = 2
        self.conv, self.after = nn.Conv2d(chs, 2 * width, 1), nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        for part in range(self.heads):
            y = y + y.unflatten(1, (self.heads, -1)).tanh().flatten(1, 2) * (0.5 + part)
        return self.after(y)


class WidthScaled(Plain):
    """Trap: a width enters the values in ways nobody sees."""

    def build(self, chs: int, width: int) -> None:
        self.conv, self.mid, self.after = nn.Conv2d(chs, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) * (2.0 / x.shape[1])
        return self.after(F.elu(self.mid(y / math.log2(1 + y.shape[1])) * 1.0 ** y.shape[1]))


VOCABULARY: tuple[Block, ...] = (
    Dilated,
    ConvNext,
    Norms2d,
    NormActs,
    InstanceNorm,
    Standardised,
    BatchNormedTokens,
    Normalised,
    GatedMlps,
    SpatialGate,
    Eca,
    Cbam,
    Coordinates,
    Context,
    Gather,
    Split,
    Selective,
    UnevenSplit,
    Res2,
    Ghost,
    CrossStage,
    Interleaved,
    Repeated,
    ZeroPadded,
    Shuffled,
    SpaceToDepth,
    Unshuffled,
    PatchMerging,
    PatchMergingView,
    ShiftedWindows,
    Pyramid,
    Pooled,
    Lines,
    ClassToken,
    MultiQuery,
    CrossAttention,
    ChannelAttention,
    Focal,
    Recurrent,
    Gru,
    Embedded,
    Shared,
    Broadcasts,
    Einsums,
    ConditionalConv,
    Masked,
    Ordered,
    Alternatives,
    Numbers,
    ListedNumbers,
    Looped,
    WidthScaled,
)
