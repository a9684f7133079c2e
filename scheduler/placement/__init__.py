"""Where a sequence goes: what it finds cached there, what it shares with others, what it costs."""
