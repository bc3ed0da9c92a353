"""Pure functions on tensors and counts: selection, merging, moments, budgets."""
