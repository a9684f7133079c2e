"""Outputs that begin with a thought: told apart from the answer, however a checkpoint marks them."""
