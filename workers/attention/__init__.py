"""Attention over the paged KV cache: one interface (`base`), several backends, one place that chooses (`select`)."""
