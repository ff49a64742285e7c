"""Entries that leave for elsewhere, and those that come from there."""
