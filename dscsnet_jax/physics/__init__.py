"""Physics: where targets are, how the optics blur them, what the sensor records."""
