"""How models speak: thoughts and calls of tools inside their text, and grammars that hold it to a form; for every door."""
