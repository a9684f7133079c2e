"""What a user configures, from files, flags and the environment: one tree, valid from its birth."""
