"""Text and tokens: prompts read, tokenised and bounded; tokens turned back into text; stop strings."""
