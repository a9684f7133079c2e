"""What the endpoint costs."""

from benchmarks.serving.compare import main

if __name__ == "__main__":
    main()
