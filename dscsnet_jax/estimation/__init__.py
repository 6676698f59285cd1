"""Estimation: whole sets of frames, from first targets to the answer of `unmix`."""

METHODS = ("dscsnet", "grid", "greedy")
ESTIMATES = ("mean", "map")
READOUTS = ("peaks", "cells")
