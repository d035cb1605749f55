"""refine-control: distil a diffusion foundation and its control module into a small student."""

__version__ = "0.1.0"
