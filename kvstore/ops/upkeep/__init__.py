"""What keeps a store whole and small: check, prune, purge, tails, doctor."""
