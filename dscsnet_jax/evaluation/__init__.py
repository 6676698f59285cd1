"""Evaluation: how well estimated targets agree with the truth, whoever made them."""
