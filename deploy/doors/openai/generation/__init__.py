"""Chat and completions: from a request to the service, and from its output to an answer."""
