"""A search over flags: W&B's sweep file, trials that are runs like any other, and a study of Optuna that they share."""
