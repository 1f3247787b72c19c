"""Proofs by enumeration and by sampling that a rule keeps the target's law."""
