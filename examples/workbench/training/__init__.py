"""A run: its step, its learners, its checkpoints and folder, its ranks, and the health of its discriminators."""
