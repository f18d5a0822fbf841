"""What a run shows and leaves behind: progress, evaluation, the exported model."""
