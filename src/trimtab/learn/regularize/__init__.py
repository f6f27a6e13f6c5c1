"""Losses, mixers and normalisations that make small networks train better, at no cost afterwards."""
