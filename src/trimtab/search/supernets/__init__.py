"""Supernets: published ways to train networks that share weights, and to choose one."""
