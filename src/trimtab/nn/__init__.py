"""Layers with at least two users."""
