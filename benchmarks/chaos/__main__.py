"""Faults at random moments."""
from benchmarks.chaos.command import main

if __name__ == "__main__":
    main()
