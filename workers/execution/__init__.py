"""One step on one device: the batch that lives there, what is launched, and what comes back."""
