"""Weights in and out: folders of other formats, and the Hugging Face Hub."""
