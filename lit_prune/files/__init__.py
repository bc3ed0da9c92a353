"""Files and values from outside, read with care, and files written whole."""
