"""Distillation: a small model learns from a larger one."""
