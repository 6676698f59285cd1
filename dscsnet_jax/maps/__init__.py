"""Maps: from frames to sub-pixel maps and first targets."""
