"""A class of transformers as one rank's decoder: its weights, shared out, and its steps."""
