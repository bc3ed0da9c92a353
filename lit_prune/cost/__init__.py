"""What ran and what it costs: traces, FLOPs, memory, sizes of models; without a model."""
