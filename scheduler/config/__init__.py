"""What may be set, and how a setting is declared."""
