"""How good a self-model is: metrics on held-out images, baselines, tables and figures."""
