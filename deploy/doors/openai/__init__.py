"""OpenAI's requests and responses: what clients say, and what they hear. The server is in `deploy/doors/http.py`."""
