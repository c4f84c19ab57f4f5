"""DINOv2's vision transformer, of which the weights are a plain file: no code comes with them.

References:
    | Oquab et al., DINOv2, arXiv 2304.07193
    | Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv 2010.11929
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn, self.ls1, self.ls2 = _Attention(width, heads), _Scale(width), _Scale(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


class VisionTransformer(nn.Module):
    """Images to the normalised class token. The defaults, and the names of the weights, are those of DINOv2 ViT-L/14.

    Args:
        width: size of a token.
        depth: number of blocks.
        heads: number of attention heads.
        patch: side of a patch, in pixels.
        positions: patches along a side that the weights have positions for; others are interpolated.
    """

    def __init__(
        self, width: int = 1024, depth: int = 24, heads: int = 16, patch: int = 14, positions: int = 37
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # of its training; in the file, and not used
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + positions**2, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.positions = positions

    def _position(self, side: int) -> Tensor:
        own, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        if side != self.positions:
            grid = grid.unflatten(1, (self.positions, self.positions)).permute(0, 3, 1, 2)
            factor = (side + 0.1) / self.positions  # its own interpolation, offset and all
            grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic").flatten(2).transpose(1, 2)
        return torch.cat([own, grid], 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map standardised images (B, 3, S, S), S a multiple of the patch, to (B, width)."""
        grid = self.patch_embed["proj"](x)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), grid.flatten(2).transpose(1, 2)], 1)
        tokens = tokens + self._position(grid.shape[-1])
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0]
