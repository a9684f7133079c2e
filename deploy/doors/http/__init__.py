"""The application that HTTP requests come in through: who may, how much, and for which model."""
