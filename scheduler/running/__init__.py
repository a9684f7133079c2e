"""What runs: rows and blocks of the resident batch, who gives way, and what is moved."""
