"""Output distillation inside the hole alone, L1, beside the task term: what MI-GAN (2023) does with its teacher."""

import torch
from torch.nn import functional as F

from refine_control.distill.loop import Losses
from refine_control.distill.stages import Seen, tri_level
from refine_control.recipe import LossWeights


def losses(seen: Seen, weights: LossWeights) -> Losses:
    terms = tri_level(seen, weights.model_copy(update={"output": 0}))
    if seen.taught is not None:
        hole = F.interpolate(seen.mask, size=seen.predicted.shape[-2:], mode="area").expand_as(seen.predicted)
        gap = (seen.predicted.float() - seen.taught.float()).abs()
        inside = (gap * hole).sum((1, 2, 3)) / hole.sum((1, 2, 3)).clamp_min(1)
        terms["output"] = torch.mean(seen.weight * inside)
    return terms
