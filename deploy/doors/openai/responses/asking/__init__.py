"""What may be asked of `/v1/responses`, and the chat that it comes to."""
