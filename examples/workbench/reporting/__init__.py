"""Scores of a segmenter, and the pictures of a run."""
