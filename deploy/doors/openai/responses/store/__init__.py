"""Where responses are kept that are to be gone on from."""
