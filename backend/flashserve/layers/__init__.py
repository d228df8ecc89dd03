"""Building blocks of models. A layer owns its weights, knows their checkpoint names' order, and calls kernels."""
