"""Checkpoints on disk: where they are, whether they are whole, whose they are."""
