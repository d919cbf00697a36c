"""The parts of a training that the loop uses."""
