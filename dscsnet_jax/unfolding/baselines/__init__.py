"""Baselines: published networks for the task, one file each, with DSCSNet's interface."""
