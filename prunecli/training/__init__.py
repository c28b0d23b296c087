"""Training: objectives, schedules, steps, checkpoints, learning rates."""
