"""Audits and protection: bias, filters of outputs, privacy of training data."""
