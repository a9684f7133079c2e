"""What every command of the command line has: its options, how it ends, and what it shows."""
