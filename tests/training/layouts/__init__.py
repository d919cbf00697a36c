"""The same trainings with the global batch split in several ways: see __main__.py."""
