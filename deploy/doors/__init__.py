"""Ways in over a network: who may come in, and OpenAI's API and Anthropic's Messages over HTTP beside Manta's own over gRPC."""
