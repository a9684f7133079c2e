"""`python -m benchmarks.kernels`: see `compare`."""

from benchmarks.kernels.compare import main

if __name__ == "__main__":
    main()
