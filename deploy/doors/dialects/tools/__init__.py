"""Output that has a form: grammars from JSON schemas, tools, and calls of them read out of text."""
