"""Which images are worth training on, and which labels: pruning, relabelling, evaluation with label sets.

Each method is a function or class of `trimtab.data`: ``tt.data.concept_pruning(data, model, keep="50%")``.
"""
