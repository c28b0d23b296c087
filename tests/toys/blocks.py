"""Small networks for the axis engine: one block per mechanism, to be stacked at random or looked at alone.

Every block maps [B, C, H, W] to [B, block.out_chs, H, W]; sizes that must follow a cut are attributes,
as in real code. Some blocks are traps: a cut of their axes would change the output, so they have to be refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Conv(nn.Module):
    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(chs, width, 3, padding=1)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


class ConvNormAct(nn.Module):
    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(chs, width, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)))


class GroupedBottleneck(nn.Module):
    """ResNeXt: 1x1, grouped 3x3, 1x1."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(chs, 8, 1)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.conv3 = nn.Conv2d(12, width, 1)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.relu(self.conv2(F.relu(self.conv1(x)))))


class Inverted(nn.Module):
    """MobileNet: expand, depthwise, squeeze-and-excite, project, add."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(chs, 2 * width, 1)
        self.bn = nn.BatchNorm2d(2 * width)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.reduce = nn.Conv2d(2 * width, 4, 1)
        self.widen = nn.Conv2d(4, 2 * width, 1)
        self.project = nn.Conv2d(2 * width, chs, 1)
        self.out_chs = chs

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.depthwise(F.hardswish(self.bn(self.expand(x)))))
        gate = F.hardsigmoid(self.widen(F.relu(self.reduce(y.mean((2, 3), keepdim=True)))))
        return x + self.project(y * gate)


class Residual(nn.Module):
    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(chs, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, chs, 3, padding=1)
        self.out_chs = chs

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.conv2(F.relu(self.bn1(self.conv1(x)))))


class Dense(nn.Module):
    """DenseNet: new channels beside the old ones."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(chs)
        self.conv = nn.Conv2d(chs, width, 3, padding=1)
        self.out_chs = chs + width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.bn(x)))], dim=1)


class PaddedShortcut(nn.Module):
    """CIFAR ResNet option A with the pad amounts as attributes."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.pad = (1, width)
        self.conv = nn.Conv2d(chs, chs + width + 1, 3, padding=1)
        self.out_chs = chs + width + 1

    def forward(self, x: Tensor) -> Tensor:
        before, after = self.pad
        return F.relu(F.pad(x, (0, 0, 0, 0, before, after)) + self.conv(x))


class ZerosBeside(nn.Module):
    """Zero channels appended with torch.zeros and cat."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.extra = width
        self.conv = nn.Conv2d(chs, chs + width, 1)
        self.out_chs = chs + width

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros(x.shape[0], self.extra, x.shape[2], x.shape[3], dtype=x.dtype)
        return torch.cat([x, zeros], 1) + self.conv(x)


class LiteralPad(nn.Module):
    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(chs, chs + 4, 1)
        self.out_chs = chs + 4

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 0, 2, 2)) + self.conv(x)


class ChunkMix(nn.Module):
    """Equal chunks that take different ways: their widths are tied."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(chs, 2 * width, 1)
        self.left = nn.Conv2d(width, width, 1)
        self.right = nn.Conv2d(width, 3, 1)
        self.out_chs = width + 3

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.conv(x).chunk(2, dim=1)
        return torch.cat([self.left(a), self.right(b)], 1)


class Split(nn.Module):
    """Pieces whose sizes are attributes."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.sizes = [width, 3]
        self.conv = nn.Conv2d(chs, width + 3, 1)
        self.left = nn.Conv2d(width, 5, 1)
        self.out_chs = 8

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.split(self.conv(x), self.sizes, dim=1)
        return torch.cat([b, self.left(F.relu(a))], 1)


class Partial(nn.Module):
    """FasterNet: only the first channels are convolved."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.first = max(chs // 2, 1)
        self.conv = nn.Conv2d(self.first, self.first, 3, padding=1)
        self.out_chs = chs

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x[:, : self.first]), x[:, self.first :]], 1)


class Gated(nn.Module):
    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(chs, 2 * width, 1)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.conv(x), dim=1)


class Shuffle(nn.Module):
    """ShuffleNet: channels of all groups interleaved."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.groups = 2
        self.conv = nn.Conv2d(chs, 2 * width, 1)
        self.grouped = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2)
        self.out_chs = 2 * width

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        b, c, h, w = x.shape
        x = x.view(b, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(b, c, h, w)
        return F.relu(self.grouped(x))


class PixelShuffle(nn.Module):
    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(chs, 4 * width, 1)
        self.after = nn.Conv2d(width, width, 2, stride=2)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        return self.after(F.pixel_shuffle(self.conv(x), 2))


class Transposed(nn.Module):
    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(chs, 6, 1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.down = nn.Conv2d(4, width, 2, stride=2)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(self.conv(x))))


class GroupNorm(nn.Module):
    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(chs, 3 * width, 1)
        self.norm = nn.GroupNorm(3, 3 * width)
        self.out_chs = 3 * width

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(self.conv(x)))


class GroupNormAct(nn.GroupNorm):
    """A norm with an activation of its own, as a child module."""

    def __init__(self, groups: int, chs: int) -> None:
        super().__init__(groups, chs)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class NormedAndActivated(nn.Module):
    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(chs, 3 * width, 1), GroupNormAct(3, 3 * width)
        self.out_chs = 3 * width

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class GroupStd(nn.Module):
    """EvoNorm's statistic (arXiv 2004.02967): a deviation inside channel groups, written out, and a width guard."""

    def __init__(self, chs: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight, self.bias, self.v = (nn.Parameter(torch.ones(chs)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        assert c % self.groups == 0
        std = x.reshape(b, self.groups, c // self.groups, h, w).var((2, 3, 4), correction=0, keepdim=True).add(1e-5)
        std = std.sqrt().expand(b, self.groups, c // self.groups, h, w).reshape(b, c, h, w)
        v, weight, bias = (p.view(1, -1, 1, 1) for p in (self.v, self.weight, self.bias))
        return x * (x * v).sigmoid() / std * weight + bias


class EvoNormed(nn.Module):
    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(chs, 3 * width, 1), GroupStd(3 * width, 3)
        self.out_chs = 3 * width

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Attention(nn.Module):
    """Fused qkv, default-scale scaled_dot_product_attention, tokens from pixels, pre-norm, residual."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 2, 4
        self.scale = self.head_dim**-0.5
        self.norm = nn.LayerNorm(chs)
        self.qkv = nn.Linear(chs, 24)
        self.proj = nn.Linear(8, chs)
        self.out_chs = chs

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        t = x.flatten(2).transpose(1, 2)
        n = t.shape[1]
        qkv = self.qkv(self.norm(t)).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        out = self.attend(*qkv.unbind(0)).transpose(1, 2).reshape(b, n, -1)
        return x + self.proj(out).transpose(1, 2).reshape(b, c, h, w)


class ExplicitAttention(Attention):
    """The same with matmul and a stale scale."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1) @ v


class RotaryAttention(Attention):
    """Queries and keys turned by a position code, default scale."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__(chs, width)
        self.register_buffer("angle", torch.linspace(0, 1, 64)[:, None])

    def turn(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * self.angle.cos() + torch.cat([-second, first], -1) * self.angle.sin()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.turn(q), self.turn(k), v)


class NormedAttention(Attention):
    """Queries and keys normalised per head, default scale."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__(chs, width)
        self.q_norm, self.k_norm = nn.LayerNorm(4), nn.LayerNorm(4)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)


class ZeroKeyBias(Attention):
    """BEiT: the keys' bias is a buffer of zeros, so a silenced channel of a head adds nothing."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__(chs, width)
        self.qkv = nn.Linear(chs, 24, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))
        self.register_buffer("k_bias", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        qkv = F.linear(self.norm(x.flatten(2).transpose(1, 2)), self.qkv.weight, bias)
        qkv = qkv.reshape(b, h * w, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        out = self.attend(*qkv.unbind(0)).transpose(1, 2).reshape(b, h * w, -1)
        return x + self.proj(out).transpose(1, 2).reshape(b, c, h, w)


class ConstantKeyBias(ZeroKeyBias):
    """Trap: queries and keys both get a bias that is no parameter, so a silenced channel still adds something."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__(chs, width)
        del self.q_bias
        self.register_buffer("q_bias", torch.ones(8))
        self.k_bias.fill_(0.5)


class AxialRotaryAttention(RotaryAttention):
    """Angles from a buffer of periods, once for each image axis, the same for both halves of a head."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__(chs, width)
        self.num_heads, self.head_dim = 2, 8
        self.qkv, self.proj = nn.Linear(chs, 48), nn.Linear(16, chs)
        self.register_buffer("periods", torch.linspace(1, 3, 2))

    def turn(self, x: Tensor) -> Tensor:
        places = torch.stack(torch.meshgrid(torch.linspace(0, 1, 8), torch.linspace(0, 1, 8), indexing="ij"), -1)
        angles = (places.flatten(0, 1)[:, :, None] / self.periods).flatten(1)
        angles = torch.cat([angles, angles], -1)
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


class PooledQueries(Attention):
    """Hiera: the largest query of each window of tokens."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        pooled = q.unflatten(2, (4, -1)).amax(2)
        return F.scaled_dot_product_attention(pooled, k, v).repeat(1, 1, 4, 1)


class SeparateAttention(nn.Module):
    """q, k, v from their own layers; the value width is an axis of its own. Head width from the sizes at hand."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.num_heads = 2
        self.q, self.k = nn.Linear(chs, 8), nn.Linear(chs, 8, bias=False)
        self.v = nn.Linear(chs, 6)
        self.proj = nn.Linear(6, width)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        t = x.flatten(2).transpose(1, 2)
        q, k, v = (f(t).reshape(b, h * w, self.num_heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(out).transpose(1, 2).reshape(b, -1, h, w)


class BatchNormedQueries(nn.Module):
    """Queries and keys from convolutions with batch norm; the norm's scale and shift take up the root."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.heads = 2
        self.q = nn.Sequential(nn.Conv2d(chs, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.k = nn.Sequential(nn.Conv2d(chs, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.v = nn.Conv2d(chs, 6, 1)
        self.proj = nn.Conv2d(6, width, 1)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        q, k, v = (f(x).reshape(b, self.heads, -1, h * w).transpose(2, 3) for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        return self.proj(out.reshape(b, -1, h, w))


class SingleHead(Attention):
    """One head, written without a dimension for it."""

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x.flatten(2).transpose(1, 2))).unflatten(-1, (3, self.proj.in_features)).unbind(2)
        return x + self.proj(self.attend(q, k, v)).transpose(1, 2).reshape(b, c, h, w)


class GroupedQueries(nn.Module):
    """Two queries share each of three keys and values (grouped-query attention)."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim = 6, 3, 4
        self.q, self.kv, self.proj = nn.Linear(chs, 24), nn.Linear(chs, 24), nn.Linear(24, chs)
        self.out_chs = chs

    def repeat(self, t: Tensor) -> Tensor:
        return t.repeat_interleave(2, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        t = x.flatten(2).transpose(1, 2)
        q = self.q(t).view(b, h * w, self.num_heads, self.head_dim).transpose(1, 2)
        k, v = self.kv(t).view(b, h * w, 2, self.kv_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, self.repeat(k), self.repeat(v))
        return x + self.proj(out.transpose(1, 2).flatten(2)).transpose(1, 2).reshape(b, c, h, w)


class ExpandedKeys(GroupedQueries):
    """The same by expand and flatten."""

    def repeat(self, t: Tensor) -> Tensor:
        return t[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2)


class MultiQuery(nn.Module):
    """All queries share one key and one value, broadcast over the heads."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 3, 4
        self.q, self.k, self.v, self.proj = (
            nn.Conv2d(chs, 12, 1),
            nn.Conv2d(chs, 4, 1),
            nn.Conv2d(chs, 5, 1),
            nn.Conv2d(15, width, 1),
        )
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        q = self.q(x).reshape(b, self.num_heads, self.head_dim, h * w).transpose(2, 3)
        k, v = (f(x).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.k, self.v))
        out = (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v
        return self.proj(out.transpose(2, 3).reshape(b, -1, h, w))


class TalkingHeads(Attention):
    """CaiT: heads are mixed by linear layers before and after the softmax."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__(chs, width)
        self.num_heads = 3
        self.qkv, self.proj = nn.Linear(chs, 36), nn.Linear(12, chs)
        self.before, self.after = nn.Linear(3, 3), nn.Linear(3, 3)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = self.before((q * self.scale @ k.transpose(-2, -1)).permute(0, 2, 3, 1)).softmax(-2)
        return self.after(weights).permute(0, 3, 1, 2) @ v


class ClassAttention(nn.Module):
    """One learnt token asks all others; the others stay as they are."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.num_heads = 2
        self.token = nn.Parameter(torch.zeros(1, 1, chs))
        self.q, self.k, self.v, self.proj = (nn.Linear(*io) for io in ((chs, 8), (chs, 8), (chs, 6), (6, chs)))
        self.out_chs = chs

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        patches = x.flatten(2).transpose(1, 2)
        t = torch.cat([self.token.expand(b, -1, -1), patches], 1)
        q, k, v = (
            f(u).reshape(b, u.shape[1], self.num_heads, -1).transpose(1, 2)
            for f, u in ((self.q, t[:, :1]), (self.k, t), (self.v, t))
        )
        token = t[:, :1] + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, 1, -1))
        return (patches + token).transpose(1, 2).reshape(b, c, h, w)


class ChannelAttention(Attention):
    """XCiT: the softmax runs over the channels of a head, which therefore stay; heads may leave."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__(chs, width)
        self.temperature = nn.Parameter(torch.ones(2, 1, 1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.normalize(q, dim=-2), F.normalize(k, dim=-2)
        weights = (q.transpose(-2, -1) @ k * self.temperature).softmax(-1)
        return (weights @ v.transpose(-2, -1)).transpose(-2, -1)


class RelativeBias(Attention):
    """A table of biases by relative position, a column a head."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__(chs, width)
        self.table = nn.Parameter(torch.zeros(15, 2))
        self.register_buffer("index", (torch.arange(64)[:, None] - torch.arange(64)).abs() % 15, persistent=False)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.table[self.index.view(-1)].view(64, 64, -1).permute(2, 0, 1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.unsqueeze(0))


class CachedBias(Attention):
    """LeViT: a row of biases a head, and a cache that an eval forward fills."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__(chs, width)
        self.biases = nn.Parameter(torch.zeros(2, 15))
        self.register_buffer("index", (torch.arange(64)[:, None] - torch.arange(64)).abs() % 15, persistent=False)
        self.cache: dict[str, Tensor] = {}

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.training:
            bias = self.biases[:, self.index]
        else:
            key = str(q.device)
            if key not in self.cache:
                self.cache[key] = self.biases[:, self.index]
            bias = self.cache[key]
        return (q * self.scale @ k.transpose(-2, -1) + bias).softmax(-1) @ v


class GatedHeads(Attention):
    """A gate for every head and token."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__(chs, width)
        self.gate = nn.Linear(chs, 2)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        t = self.norm(x.flatten(2).transpose(1, 2))
        qkv = self.qkv(t).reshape(b, h * w, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        gates = self.gate(t).sigmoid().transpose(1, 2).unsqueeze(-1)
        out = (self.attend(*qkv.unbind(0)) * gates).transpose(1, 2).reshape(b, h * w, -1)
        return x + self.proj(out).transpose(1, 2).reshape(b, c, h, w)


class LatentQueries(nn.Module):
    """Attention pooling by learnt queries (`AttentionPoolLatent`), read by a layer over all of them."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 2, 4
        self.latent = nn.Parameter(torch.zeros(1, 3, chs))
        self.q, self.kv, self.proj = nn.Linear(chs, 8), nn.Linear(chs, 16), nn.Linear(8, width)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        q = self.q(self.latent.expand(b, -1, -1)).reshape(b, 3, self.num_heads, self.head_dim).transpose(1, 2)
        kv = self.kv(x.flatten(2).transpose(1, 2)).reshape(b, h * w, 2, self.num_heads, self.head_dim)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, 3, self.num_heads * self.head_dim)
        return self.proj(out.mean(1))[:, :, None, None] * x[:, :1].sigmoid()


class QueryBias(Attention):
    """SAM: the bias of the attention is read off the queries, which therefore cannot take up the root; keys can."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__(chs, width)
        self.places = nn.Parameter(torch.zeros(64, 4))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=q @ self.places.transpose(0, 1))


class LinearAttention(Attention):
    """EfficientViT: a column of ones beside the values gives the sum to divide by, sliced off from the end."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        v = F.pad(v, (0, 1), value=1.0)
        out = F.relu(q) @ (F.relu(k).transpose(-2, -1) @ v)
        return out[..., :-1] / (out[..., -1:] + 0.1)


class RootScaledAttention(Attention):
    """The root is taken from the shape in Python: it would change with the cut, so the head width must stay."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1) @ v


class TokenMixer(nn.Module):
    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(64, 10), nn.Linear(10, 64)
        self.fc3, self.fc4 = nn.Linear(chs, 12), nn.Linear(12, chs)
        self.position = nn.Parameter(torch.zeros(1, 64, chs))
        self.out_chs = chs

    def forward(self, x: Tensor) -> Tensor:
        t = x.flatten(2) + self.position.transpose(1, 2)
        t = t + self.fc2(F.gelu(self.fc1(t)))
        t = t.transpose(1, 2)
        t = t + self.fc4(F.gelu(self.fc3(t)))
        return t.transpose(1, 2).reshape(x.shape)


class SigmoidSum(nn.Module):
    """Trap: silenced channels are one half when they are summed."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(chs, 5, 1), nn.Conv2d(chs, width, 1)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x * torch.sigmoid(self.conv(x)).sum(1, keepdim=True))


class ReluSum(SigmoidSum):
    """No trap: silenced channels add nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x * F.relu(self.conv(x)).sum(1, keepdim=True))


class ChannelMean(SigmoidSum):
    """Trap: a mean divides by the count."""

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x * self.conv(x).mean(1, keepdim=True))


class ExpProduct(nn.Module):
    """Trap: two activations that are one where silenced are contracted (linear attention)."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(chs, 6), nn.Linear(chs, 6), nn.Linear(chs, width)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        t = x.flatten(2).transpose(1, 2)
        q, k = F.elu(self.q(t)) + 1, F.elu(self.k(t)) + 1
        out = q @ (k.transpose(1, 2) @ self.v(t))
        return (0.05 * out).transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])


class ChannelSoftmax(nn.Module):
    """Trap: a softmax over channels."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(chs, 6, 1), nn.Conv2d(6, width, 1)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.conv(x).softmax(1))


class Rolled(nn.Module):
    """Trap: channels change places by number."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(chs, width, 1)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x + x.roll(1, 1)


class LiteralView(nn.Module):
    """Trap: a size written as a number."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(chs, 12, 1), nn.Conv2d(12, width, 1)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.after(y.view(y.shape[0], 3, 4, 8, 8).transpose(1, 2).reshape(y.shape))


class ScaledByWidth(nn.Module):
    """Trap: the width is a factor of the values."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(chs, width, 1), nn.Conv2d(width, width, 1)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.after(y * (1 / y.shape[1]))


class BranchOnWidth(nn.Module):
    """Trap: another path is taken for narrow maps."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(chs, 8, 1), nn.Conv2d(8, width, 1)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.after(y.tanh() if y.shape[1] >= 8 else y)


class InPlaceView(nn.Module):
    """Trap: a view makes silenced channels non-zero behind the base tensor's back."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(chs, 6, 1), nn.Conv2d(chs, width, 1)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y[:, :, 0] += 1.0
        return self.after(x * y.sum(1, keepdim=True))


class WeightStandardised(nn.Module):
    """The statistic of a weight over its inputs."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(chs, width, 3, padding=1)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        w = self.conv.weight
        w = w - w.mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.conv.bias, padding=1)


class Windowed(nn.Module):
    """A convolution inside 4 x 4 windows, which are folded into the batch."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(chs, width, 3, padding=1)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        windows = x.view(b, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, 4, 4)
        y = F.relu(self.conv(windows)).view(b, h // 4, w // 4, -1, 4, 4)
        return y.permute(0, 3, 1, 4, 2, 5).reshape(b, -1, h, w)


class Overlapping(nn.Module):
    """Sums over overlapping 3 x 3 windows, once by ``unfold`` of a tensor, once by im2col and col2im."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(chs, 5, 1), nn.Conv2d(5, width, 1)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        windows = F.pad(y, (1, 1, 1, 1)).unfold(2, 3, 1).unfold(3, 3, 1)
        columns = F.unfold(y, kernel_size=3, padding=1)
        return self.after(windows.sum((4, 5)) + F.fold(columns.sigmoid() * columns, y.shape[2:], 3, padding=1))


class Guarded(nn.Module):
    """Takes its path by two widths it was told, of which only one is called like one."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.dim, self.dim_out = chs, chs
        self.conv, self.after = nn.Conv2d(chs, chs, 1), nn.Conv2d(chs, width, 1)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        return self.after(x + y if self.dim == self.dim_out else y)


class StreamAttention(nn.Module):
    """The output is shaped like the stream: its channels are heads * head width, so one of these follows a cut."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 3, 4
        self.conv = nn.Conv2d(chs, 12, 1)
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)
        self.out_chs = 12

    def width_of(self, channels: int) -> int:
        return self.head_dim

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        b, c, h, w = x.shape
        t = x.flatten(2).transpose(1, 2)
        n = t.shape[1]
        qkv = self.qkv(t).reshape(b, n, 3, self.num_heads, self.width_of(c)).permute(2, 0, 3, 1, 4)
        out = self.attend(*qkv.unbind(0)).transpose(1, 2).reshape(b, n, c)
        return x + self.proj(out).transpose(1, 2).reshape(b, c, h, w)


class SharedAttention(StreamAttention):
    """The head width is computed: channels // heads."""

    def width_of(self, channels: int) -> int:
        return channels // self.num_heads


class HeldWidthAttention(SharedAttention):
    """Attention between the channels of a head (XCiT): the head width stays, heads follow the stream."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q.transpose(-2, -1) @ k).softmax(dim=-1) @ v.transpose(-2, -1)).transpose(-2, -1)


class HeadWindows(SharedAttention):
    """Heads in blocks with a convolution each (CoaT): block sizes are attributes, so the heads are several axes."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__(chs, width)
        self.splits = [4, 8]
        self.convs = nn.ModuleList(nn.Conv2d(n, n, 3, padding=1, groups=n) for n in self.splits)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, heads, n, d = v.shape
        image = v.transpose(-2, -1).reshape(b, heads * d, 8, 8)
        pieces = torch.split(image, self.splits, dim=1)
        image = torch.cat([conv(piece) for conv, piece in zip(self.convs, pieces, strict=True)], 1)
        return super().attend(q, k, v) + image.reshape(b, heads, d, n).transpose(-2, -1)


class HalfAttribute(nn.Module):
    """Two pieces of ``expanded // 2`` channels that take different ways (CSP blocks)."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.expanded = 2 * width
        self.conv = nn.Conv2d(chs, 2 * width, 1)
        self.right = nn.Conv2d(width, 3, 1)
        self.out_chs = width + 3

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.relu(self.conv(x)).split(self.expanded // 2, dim=1)
        return torch.cat([a, self.right(b)], 1)


class TwiceAttribute(nn.Module):
    """An attribute that is half a width: only even numbers of channels can stay."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.base = width
        self.conv = nn.Conv2d(chs, 2 * width, 1)
        self.out_chs = 2 * width

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + torch.zeros(x.shape[0], self.base * 2, *x.shape[2:], dtype=x.dtype)


class Narrower(nn.Module):
    """The path depends on which of two widths is larger."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Conv2d(chs, 4, 1), nn.Conv2d(chs, 6, 1)
        self.one, self.two = nn.Conv2d(4, width, 1), nn.Conv2d(6, width, 1)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.narrow(x), self.wide(x)
        return self.one(a) if a.shape[1] >= b.shape[1] else self.one(a) + self.two(b)


class TwoCounts(HeldWidthAttention):
    """Trap: the stream is read as three and as four heads of widths that stay."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__(chs, width)
        self.second = HeldWidthAttention(12, width)
        self.second.num_heads = 4
        self.second.conv = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(super().forward(x))


class MixedTokens(nn.Module):
    """A convolution over stacked tokens: its channels are the tokens, its positions are the channels."""

    def __init__(self, chs: int, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(chs, 5, 1), nn.Conv2d(chs, 5, 1)
        self.mix, self.after = nn.Conv1d(2, 1, 1), nn.Linear(5, width)
        self.out_chs = width

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.stack([F.relu(conv(x)).mean((2, 3)) for conv in (self.first, self.second)], dim=1)
        return self.after(self.mix(tokens).squeeze(1))[:, :, None, None].expand(-1, -1, *x.shape[2:])


Block = Callable[[int, int], nn.Module]
BLOCKS: tuple[Block, ...] = (
    Conv,
    ConvNormAct,
    GroupedBottleneck,
    Inverted,
    Residual,
    Dense,
    PaddedShortcut,
    ZerosBeside,
    LiteralPad,
    ChunkMix,
    Split,
    Partial,
    Gated,
    Shuffle,
    PixelShuffle,
    Transposed,
    GroupNorm,
    NormedAndActivated,
    EvoNormed,
    Attention,
    ExplicitAttention,
    RotaryAttention,
    NormedAttention,
    ZeroKeyBias,
    ConstantKeyBias,
    AxialRotaryAttention,
    PooledQueries,
    BatchNormedQueries,
    SeparateAttention,
    SingleHead,
    GroupedQueries,
    ExpandedKeys,
    MultiQuery,
    TalkingHeads,
    ClassAttention,
    ChannelAttention,
    RelativeBias,
    CachedBias,
    GatedHeads,
    LatentQueries,
    QueryBias,
    LinearAttention,
    RootScaledAttention,
    TokenMixer,
    SigmoidSum,
    ReluSum,
    ChannelMean,
    ExpProduct,
    ChannelSoftmax,
    Rolled,
    LiteralView,
    ScaledByWidth,
    BranchOnWidth,
    InPlaceView,
    WeightStandardised,
    Windowed,
    Overlapping,
    MixedTokens,
    Guarded,
    StreamAttention,
    SharedAttention,
    HeldWidthAttention,
    HeadWindows,
    HalfAttribute,
    TwiceAttribute,
    Narrower,
    TwoCounts,
)

INPUT = (3, 8, 8)


class Parallel(nn.Module):
    """Two blocks side by side: concatenated, added or multiplied (where widths differ, after a convolution)."""

    def __init__(self, first: nn.Module, second: nn.Module, join: str) -> None:
        super().__init__()
        self.first, self.second, self.join = first, second, join
        a, b = first.out_chs, second.out_chs
        self.fit = nn.Identity() if a == b or join == "cat" else nn.Conv2d(b, a, 1)
        self.out_chs = a + b if join == "cat" else a

    @classmethod
    def of(cls, first: Block, second: Block, width: int, join: str) -> Block:
        """A block of two blocks, the second one of its own width."""
        return lambda chs, own: cls(first(chs, own), second(chs, width), join)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x), self.fit(self.second(x))
        if self.join == "cat":
            return torch.cat([a, b], 1)
        return a + b if self.join == "add" else a * torch.sigmoid(b)


class Stack(nn.Module):
    """A stem, blocks, a pooled hidden layer and a classifier; images [B, 3, 8, 8] → [B, 5]."""

    def __init__(self, blocks: Sequence[Block], widths: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        chs, made = 6, []
        for block, width in zip(blocks, widths, strict=True):
            made.append(block(chs, width))
            chs = made[-1].out_chs
        self.blocks = nn.Sequential(*made)
        self.hidden = nn.Linear(chs, 7)
        self.head = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.stem(x)))
        return self.head(F.gelu(self.hidden(x.mean((2, 3)))))
