"""Entries in an object store: how they lie there, and how they get there and back."""
