"""Biharmonic interpolation (Damelin & Hoang 2018), see evaluate/baselines.py."""

from refine_control.evaluate.baselines import biharmonic as fill

__all__ = ["fill"]
