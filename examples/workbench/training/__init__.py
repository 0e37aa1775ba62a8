"""A training run: the step, the learners, checkpoints, the run folder, ranks, and the health of the discriminators."""
