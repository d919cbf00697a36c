"""The W&B run: which, how it is opened and closed, over all attempts."""
