"""From logits to the next token: settings, noise, penalties, log-probabilities, grammars."""
