"""Several methods at several budgets on one teacher and one data set: cells, measuring, tables, plots."""
