"""The step loop of one group, and what a rank knows of its batch on the host. No torch."""
