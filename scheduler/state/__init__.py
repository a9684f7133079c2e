"""What is known: who waits, what runs, what moves, and what must hold of it. Decides nothing."""
