"""Official scoring rules of public benchmarks.

One module a benchmark, named as `lit-prune score` names it, with one `Rule`: how an answer is judged and what the
figures are. Rules are plain Python; `lit_prune.evaluation.scorers.metric.Scorer` makes a torchmetrics metric of one.
"""

from importlib import import_module

from lit_prune.evaluation.scorers.rule import Question, Rule

__all__ = ["Question", "Rule", "rule_of"]


def rule_of(name: str, **options: bool) -> Rule:
    """Build a benchmark's rule: `rule_of("pope")`, or `rule_of("vqa", raw=False)` for submissions."""
    return import_module(f"{__name__}.{name}").RULE(**options)
