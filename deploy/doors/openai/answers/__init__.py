"""What OpenAI's clients hear: records, and how outputs become them."""
