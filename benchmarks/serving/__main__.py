from benchmarks.serving.compare import main

main()
