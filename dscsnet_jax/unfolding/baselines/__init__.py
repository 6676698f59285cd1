"""Baselines: published networks for the task, one file each, with DSCSNet's interface."""

PUBLISHED = ("dista_net", "fista_net", "ista_net", "ista_net_plus")
"""Methods with published PyTorch checkpoints: those whose class has a `layout`."""
