"""Inference: one model of a scene, and all that asks it: pure functions, no host call."""
