"""Factorization: replacing a layer by a product of smaller ones."""
