"""`eval_mode`, which lives in `trimtab.nn.modes`: features are extracted below this floor, too."""

from trimtab.nn.modes import eval_mode

__all__ = ["eval_mode"]
