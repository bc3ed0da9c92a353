"""Traces of forwards and their cost: FLOPs, memory, sizes of models; without a model."""
