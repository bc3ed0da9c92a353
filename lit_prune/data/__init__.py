"""Instruction data: from JSON and image files to batches. Import the data modules from their own files."""
