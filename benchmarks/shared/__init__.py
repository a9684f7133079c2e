"""What several benchmarks use: checkpoints, prompts, engines and endpoints as processes, clients, tables."""
