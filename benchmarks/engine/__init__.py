"""The engine beside its peers, and what moves blocks and sequences between its groups."""
