"""Estimation: whole sets of frames, from first targets to the answer of `unmix`."""
