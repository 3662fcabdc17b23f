"""Model folders in Hugging Face format: their names, reading in slices, writing, heads, LoRA."""
