"""Unfolding: ADMM as pure steps composed by one scan, and the networks made of them."""
