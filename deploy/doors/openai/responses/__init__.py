"""`/v1/responses`: OpenAI's Responses as chat requests, their answers in their own shape, and where these are kept."""
