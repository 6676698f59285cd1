"""Pretrained: released weights, each a `NAME.safetensors` and its `NAME.json`."""
