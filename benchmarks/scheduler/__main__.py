"""What the scheduler costs."""

from benchmarks.scheduler.events import main

if __name__ == "__main__":
    main()
