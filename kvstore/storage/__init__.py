"""The folder of a store: all opening of files, syncs, locks and SQL."""
