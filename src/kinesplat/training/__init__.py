"""Training of self-models: one loop as plain functions, and the recipes on top of it."""
