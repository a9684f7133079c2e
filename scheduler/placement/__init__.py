"""A request's way to a group: whether it is taken in, what it finds cached, what it shares with others, what it costs."""
