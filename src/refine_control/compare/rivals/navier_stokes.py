"""Navier-Stokes (Bertalmio 2001), see evaluate/baselines.py."""

from refine_control.evaluate.baselines import navier_stokes as fill

__all__ = ["fill"]
