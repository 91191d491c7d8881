"""Many looks of one drawing, as plain tensor operations on a whole batch, on the batch's device.

What is random is drawn where its generator is, so that a look is the same on every device but for rounding.

B batch  S side of the render  s side wanted
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Augment:
    """RGBA renders to normalised pixels: moved, scaled, turned, on a coloured ground, recoloured, or as line art.

    scale     smallest and largest size of the drawing
    shift     furthest move, as a part of the side
    turn      furthest turn, in degrees
    flip      how often it is mirrored
    white     how often the ground is white; any colour otherwise
    recolour  how often contrast, brightness and channels change
    line_art  how often outlines are drawn and the filling fades, as in a pen drawing
    fade      how often all but dark colours go towards white
    """

    scale: tuple[float, float] = (0.6, 1.1)
    shift: float = 0.12
    turn: float = 15.0
    flip: float = 0.3
    white: float = 0.6
    recolour: float = 0.5
    line_art: float = 0.4
    fade: float = 0.0

    def __call__(self, rgba: Tensor, side: int, generator: torch.Generator) -> Tensor:
        """B S S 4 uint8 -> B 3 s s float32 in [-1, 1]"""
        return self.look(rgba, side, generator)[0]

    def look(self, rgba: Tensor, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The same, and where each look's points were in its drawing, as `affine_grid` takes it: B 2 3."""
        B = len(rgba)

        def uniform(low: float = 0.0, high: float = 1.0) -> Tensor:
            drawn = torch.empty(B, 1, 1, 1, device=generator.device).uniform_(low, high, generator=generator)
            return drawn.to(rgba.device)

        x = rgba.permute(0, 3, 1, 2).float() / 255  # B 4 S S
        x = torch.cat([x[:, :3] * x[:, 3:], x[:, 3:]], dim=1)  # colours times coverage, so that edges mix well
        x, theta = self._move(x, side, uniform)  # B 4 s s
        if self.fade:
            x = torch.where(uniform() < self.fade, self._fade(x, uniform), x)
        ground = torch.rand(B, 3, 1, 1, generator=generator, device=generator.device).to(x.device)
        ground = torch.where(uniform() < self.white, torch.ones_like(ground), ground)
        lines, strength, kept = uniform() < self.line_art, uniform(1.2, 3.0), uniform()
        drawn = torch.nonzero(lines.flatten())[:, 0]
        art = self._line_art(x[drawn], ground[drawn], strength[drawn], kept[drawn])
        x = (x[:, :3] + ground * (1 - x[:, 3:])).index_copy(0, drawn, art)  # B 3 s s
        x = torch.where(uniform() < self.recolour, self._recolour(x, uniform), x)
        return x.clamp(0, 1) * 2 - 1, theta

    def _move(self, x: Tensor, side: int, uniform) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        size, turn = uniform(*self.scale)[:, 0, 0, 0], uniform(-self.turn, self.turn)[:, 0, 0, 0].deg2rad()
        mirror = torch.where(uniform()[:, 0, 0, 0] < self.flip, -1.0, 1.0)
        cos, sin = turn.cos() / size, turn.sin() / size
        right, down = (uniform(-2 * self.shift, 2 * self.shift)[:, 0, 0, 0] for _ in range(2))
        theta = torch.stack([cos * mirror, -sin * mirror, right, sin, cos, down], dim=1).view(-1, 2, 3)
        if side < x.shape[-1]:  # sampled twice as fine and averaged, so that thin lines do not break
            grid = F.affine_grid(theta, [len(x), 4, 2 * side, 2 * side], align_corners=False)
            return F.avg_pool2d(F.grid_sample(x, grid, align_corners=False), 2), theta
        grid = F.affine_grid(theta, [len(x), 4, side, side], align_corners=False)
        return F.grid_sample(x, grid, align_corners=False), theta

    def _fade(self, x: Tensor, uniform) -> Tensor:  # type: ignore[no-untyped-def]
        """Colours towards white and dark ones as they are: a colouring book."""
        coverage = x[:, 3:]
        light = (4 * (x[:, :3].mean(1, keepdim=True) / coverage.clamp(min=0.05) - 0.1)).clamp(0, 1)
        lost = light * uniform()
        return torch.cat([x[:, :3] * (1 - lost) + coverage * lost, coverage], dim=1)

    def _line_art(self, x: Tensor, ground: Tensor, strength: Tensor, kept: Tensor) -> Tensor:
        """Outlines where colour or coverage changes within a pixel; the filling fades towards the ground."""
        thick = F.max_pool2d(x, 3, 1, 1) + F.max_pool2d(-x, 3, 1, 1)  # B 4 s s, brightest less darkest around
        edge = (thick.amax(1, keepdim=True) * strength - 0.25).clamp(0, 1)
        filled = ground + (x[:, :3] + ground * (1 - x[:, 3:]) - ground) * kept
        return filled * (1 - edge) + 0.1 * edge

    def _recolour(self, x: Tensor, uniform) -> Tensor:  # type: ignore[no-untyped-def]
        grey = x.mean(1, keepdim=True)
        x = grey + (x - grey) * uniform(0.2, 1.4)  # saturation
        tint = torch.cat([uniform(0.7, 1.2) for _ in range(3)], dim=1)
        return (x - 0.5) * uniform(0.7, 1.2) + 0.5 * tint + uniform(-0.1, 0.1)


def plain(rgba: Tensor, side: int | None = None) -> Tensor:
    """The drawing as it is, on white. B S S 4 uint8 -> B 3 S S uint8, or B 3 s s of another side."""
    x = rgba.permute(0, 3, 1, 2).float()
    x = x[:, :3] * (x[:, 3:] / 255) + 255 - x[:, 3:]
    if side is not None and side != x.shape[-1]:
        x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return x.round().clamp(0, 255).to(torch.uint8)
