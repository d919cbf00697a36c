"""What is typed beside a training: `python -m harness.sync`, `python -m harness.submit`."""
