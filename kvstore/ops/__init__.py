"""One file a job: functions over the blocks and the entries of a store."""
