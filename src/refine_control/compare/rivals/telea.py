"""Fast marching (Telea 2004), see evaluate/baselines.py."""

from refine_control.evaluate.baselines import telea as fill

__all__ = ["fill"]
