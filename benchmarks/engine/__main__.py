from benchmarks.engine.compare import main

main()
