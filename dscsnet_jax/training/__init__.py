"""Training: pure loss and step, one seam for data parallelism, checkpoints, the loop."""
