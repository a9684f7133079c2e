"""A token for each row of logits, in few passes over the vocabulary."""
