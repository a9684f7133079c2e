"""What Manta does on a GPU, work by work."""

from benchmarks.gpu.compare import main

if __name__ == "__main__":
    main()
