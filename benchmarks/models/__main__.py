"""Model types held against transformers."""

from benchmarks.models.command import main

if __name__ == "__main__":
    main()
