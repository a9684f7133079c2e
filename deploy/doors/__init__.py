"""Ways in over a network: who may come in, and OpenAI's API over HTTP beside Manta's own over gRPC."""
