"""What is measured of the engine, of vLLM's bookkeeping and of the production core."""
