"""Population based search: members of a population go on from each other's checkpoints, with other values of flags."""
