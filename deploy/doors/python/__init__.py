"""The door for Python: `LLM`, and what prompts without a schema are read from."""
