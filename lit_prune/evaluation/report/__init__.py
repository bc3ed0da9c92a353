"""A report of comparisons: read from their folders, with intervals, written as one HTML file."""
