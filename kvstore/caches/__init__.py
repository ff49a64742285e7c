"""mlx-lm's prompt caches: the only package, with the server, that touches them."""
