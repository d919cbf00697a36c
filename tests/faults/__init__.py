"""The kill laboratory: trainings are killed anywhere and restarted, then compared with one that was left alone."""
