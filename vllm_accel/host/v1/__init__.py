"""Adapters for Model Runner V1."""
