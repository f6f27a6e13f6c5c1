"""Evidence: one script per system that measures its claims again, on real data.

A script `evidence/<slug>.py` has one function::

    from evidence import ClaimResult, Context

    def run(context: Context) -> list[ClaimResult]:
        data = context.load_data("digits")
        epochs = context.choose(full=20, smoke=1)
        rows = [one_seed(data, seed, epochs) for seed in context.each_seed("small_data")]
        ...
        return [ClaimResult("small_data", holds=..., measured={...}, baseline={...}, seeds=context.seeds)]

and, when the system is also usable from the command line and from a recipe, `LEVEL = 4`. A claim is measured against
its own baseline, on the same data, with the same budget, in the same run, with at least three seeds. A claim that does
not hold is reported with ``holds=False`` and a note that says why: that, too, is a result.

Run with ``python -m evidence SLUG...``; the results are `evidence/results/<slug>.json`.
"""

from evidence.runner import ClaimResult, Context

__all__ = ["ClaimResult", "Context"]
