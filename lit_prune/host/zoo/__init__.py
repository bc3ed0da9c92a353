"""Tiny random models of every image-text-to-text class of transformers, and what pruning does on each."""
