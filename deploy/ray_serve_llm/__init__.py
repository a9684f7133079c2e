"""Ray Serve LLM's configuration, read as Manta's: `manta.serve.llm` is what users import of it."""
