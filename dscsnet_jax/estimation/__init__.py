"""Estimation: from sub-pixel maps to targets: read-out and the main job, `unmix`."""
