"""Training of heads on a frozen base model."""
