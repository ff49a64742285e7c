"""The verbs: one file for those that share words, a Python method behind each."""
