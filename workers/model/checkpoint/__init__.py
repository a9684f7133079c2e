"""A checkpoint's weights, from its files to a rank's shard."""
