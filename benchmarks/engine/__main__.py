"""Manta's engine beside its peers."""

from benchmarks.engine.compare import main

if __name__ == "__main__":
    main()
