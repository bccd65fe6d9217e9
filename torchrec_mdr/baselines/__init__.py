"""Baselines: what the papers' methods are compared with, one file each, and the layers that only they use."""
