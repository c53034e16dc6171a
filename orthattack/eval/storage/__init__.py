"""The files of a run: folders, shards, stores and locks."""
