"""Whose an estate is: what an owner says to it, what it has left, and who came last."""
