"""The mean colour of the known pixels, see evaluate/baselines.py."""

from refine_control.evaluate.baselines import mean_fill as fill

__all__ = ["fill"]
