"""EHR foundation models for Hugging Face transformers."""
