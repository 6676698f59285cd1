"""Io: frames in, target tables out, the published data layout, released weights."""
