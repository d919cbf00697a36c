"""The rows of a run: journalled, counted, delivered."""
