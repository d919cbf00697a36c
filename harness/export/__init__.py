"""A checkpoint as a folder that `from_pretrained` loads."""
