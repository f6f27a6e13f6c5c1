"""Quantization: fewer bits for weights and activations, trained with straight-through gradients, stored packed."""
