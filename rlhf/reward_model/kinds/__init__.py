"""What a reward model can learn from (`score.kind`): each reads its data, and has its loss and measures."""
