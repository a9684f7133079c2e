"""Server-sent events of one answer, and the marks by which a stream that was cut goes on."""
