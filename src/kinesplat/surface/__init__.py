"""Robot surfaces to flat Gaussians bound to links."""
