"""What is seen of requests from outside: metrics, logs, traces, the request log."""
