"""Pre-training: features are learned without labels first."""
