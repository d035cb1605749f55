"""`feedforward` with as many parameters as the student of recipes/compare-larger.yaml: 8.0M."""

from refine_control.compare.rivals import feedforward


class Network(feedforward.Network):
    def __init__(self) -> None:
        super().__init__(widths=(72, 176, 320))
