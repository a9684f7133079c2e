"""The five questions, each answered as plain data."""
