"""What stands between the QKV product and attention: heads turned, and their way into the pool."""
