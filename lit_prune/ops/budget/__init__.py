"""Budgets and schedules: `keep` counts visual tokens averaged over the inputs of all decoder layers."""

from lit_prune.ops.budget.grammar import (
    Budget,
    Schedule,
    Share,
    as_json,
    format_budget,
    format_schedule,
    parse_budget,
    resolve,
    tokens,
)
from lit_prune.ops.budget.schedule import OutOfReach, asked, average, check_layers, given, scale_layers, solve, spans

__all__ = [
    "Budget",
    "OutOfReach",
    "Schedule",
    "Share",
    "as_json",
    "asked",
    "average",
    "check_layers",
    "format_budget",
    "format_schedule",
    "given",
    "parse_budget",
    "resolve",
    "scale_layers",
    "solve",
    "spans",
    "tokens",
]
