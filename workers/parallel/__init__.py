"""How the ranks of a group talk: one interface, and who implements it."""
