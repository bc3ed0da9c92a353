"""Parts shared by the verbs: options and error messages, overlays, console output, cost tables."""
