"""Output of a run: progress, evaluation, and the exported model."""
