"""Run a model with a store around it."""
