"""The reference trainer: ASS assembled from semshift's parts. Run as `python -m examples.workbench`."""
