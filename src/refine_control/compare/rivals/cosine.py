"""The tri-level loss with a feature term that sees directions only: 1 - cos(B_p(s_p), T_p), at each place."""

from dataclasses import replace

import torch
from torch.nn import functional as F

from refine_control.distill.loop import Losses
from refine_control.distill.stages import Seen, tri_level
from refine_control.recipe import LossWeights


def losses(seen: Seen, weights: LossWeights) -> Losses:
    terms = tri_level(replace(seen, bridges=None), weights)
    if seen.bridges:
        bridged = seen.bridges(seen.student)
        cosines = [
            F.cosine_similarity(bridged[ours].float(), seen.teacher[theirs].float(), dim=1).mean()
            for ours, theirs in seen.bridges.mapping.items()
        ]
        terms["feature"] = 1 - torch.stack(cosines).mean()
    return terms
