"""Pure functions of tensors and counts: selection, merging, moments, budgets."""
