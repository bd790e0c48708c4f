"""Experiments of the paper in small: python -m tools.experiments NAME."""
