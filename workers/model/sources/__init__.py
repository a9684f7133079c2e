"""Where a checkpoint is by what people call it: a folder, an id at Hugging Face, a URL. Its files come into a folder here."""
