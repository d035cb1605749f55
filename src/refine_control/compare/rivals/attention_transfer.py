"""Attention transfer (Zagoruyko & Komodakis 2017, 1612.03928), beside the task and the output term.

    L_feat = mean over points p of || Q(s_p) - Q(T_p) ||^2,   Q(f) = vec(sum_c f_c^2), divided by its L2 norm

Summed over channels, so that no bridge is needed; the student's map takes the teacher's resolution.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from refine_control.distill.loop import Losses
from refine_control.distill.stages import Seen, tri_level
from refine_control.recipe import LossWeights


def losses(seen: Seen, weights: LossWeights) -> Losses:
    terms = tri_level(replace(seen, bridges=None), weights)
    if seen.bridges:
        pairs = [(seen.student[ours], seen.teacher[theirs]) for ours, theirs in seen.bridges.mapping.items()]
        gaps = [(attention(s, t.shape[-2:]) - attention(t, t.shape[-2:])).square().sum(1).mean() for s, t in pairs]
        terms["feature"] = torch.stack(gaps).mean()
    return terms


def attention(feature: Tensor, size: tuple[int, ...]) -> Tensor:
    """(B, C, h, w) -> (B, H W) of norm 1, H and W of `size`."""
    energy = feature.float().square().mean(1, keepdim=True)
    if energy.shape[-2:] != size:
        energy = F.interpolate(energy, size=size, mode="bilinear", antialias=True)
    return F.normalize(energy.flatten(1), dim=1)
