"""Parts shared by the verbs: parsers and their error messages, console output, cost tables."""
