"""Quick scores: no network looks at the pictures, and nobody counts what a model costs."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from refine_control.evaluate import domains
from refine_control.evaluate.features import Extractor


class Nothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        return [], images.new_zeros(len(images), 1)


@pytest.fixture(autouse=True)
def _quick_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domains, "efficientnet_lite0", lambda: Extractor("nothing", "", "", 8, {}, Nothing()))
    monkeypatch.setattr(domains, "cost", lambda denoiser, model: SimpleNamespace(parameters=1, macs=1))
