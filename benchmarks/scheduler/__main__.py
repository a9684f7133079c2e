from benchmarks.scheduler.events import main

main()
