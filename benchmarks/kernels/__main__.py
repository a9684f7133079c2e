"""GPU kernels against their limits."""

from benchmarks.kernels.compare import main

if __name__ == "__main__":
    main()
