"""OpenAI's requests and responses: what clients say, and what they hear. Records and functions; HTTP is in `deploy/http.py`."""
