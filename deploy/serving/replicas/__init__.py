"""The endpoint as an application of Ray Serve: its replicas, and how they find one another."""
