"""What is computed of requests without an engine."""
