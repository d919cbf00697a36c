"""Export a checkpoint as a folder that `from_pretrained` loads."""
