"""Signals and gates: where is drafting worth it?"""
