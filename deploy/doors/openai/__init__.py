"""OpenAI's requests and answers: what clients say, and what they hear. The server is in `deploy/doors/http/app.py`."""
