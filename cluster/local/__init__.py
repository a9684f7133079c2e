"""The whole of Manta on this machine, without Ray."""
