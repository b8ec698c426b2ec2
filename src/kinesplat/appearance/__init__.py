"""Appearance that depends on the configuration: the paper's field."""
