"""Everything that a researcher watches: the run folder, metrics, progress, rollouts to read."""
