"""Pruning: removing weights, channels, heads and widths until a budget is met."""
