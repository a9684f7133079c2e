"""One prompt: as a request on its way out, and as choices that grow on their way back."""
