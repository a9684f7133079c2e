"""How a response is told, whole or as events."""
