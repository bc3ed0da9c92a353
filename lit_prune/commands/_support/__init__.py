"""What the verbs share: options and their explanations, overlays, output, bills."""
