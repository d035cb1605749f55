"""What a stranger's config may ask for."""

from typing import Any

import pytest

from refine_control.diffusion.weights import asks_for_more_layers, check_config
from refine_control.errors import ModelError

SDXL = {"block_out_channels": [320, 640, 1280], "layers_per_block": 2, "transformer_layers_per_block": [1, 2, 10]}


@pytest.mark.parametrize(
    ("config", "more"),
    [
        (SDXL, False),
        ({"num_hidden_layers": 32}, False),
        ({**SDXL, "layers_per_block": 1_000_000}, True),
        ({**SDXL, "block_out_channels": [8] * 5_000}, True),
        ({"text_config": {"num_hidden_layers": 1_000_000}}, True),
        ({"transformer_layers_per_block": [[1] * 5_000]}, True),
    ],
)
def test_layers_are_counted_at_any_depth(config: dict[str, Any], more: bool) -> None:
    assert asks_for_more_layers(config) is more


def test_one_key_may_not_stand_for_another() -> None:
    with pytest.raises(ModelError, match="attribute_map is"):
        check_config("config.json", {"attribute_map": {"num_hidden_layers": "width"}, "width": 1_000_000})
